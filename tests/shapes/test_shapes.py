"""Every public function of arrays gives the shapes and dtypes that it promises, by the tables beside this file."""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import pathlib
import re
from collections.abc import Callable, Iterator

import chex
import pytest

import blip2_jax
from tests.shapes import data, evaluation, language, lengths, losses, models, objectives, parallel, tasks, training
from tests.shapes.promises import made, name_of

TABLES = (objectives, models, language, losses, tasks, parallel, training, data, evaluation)
PROMISES = [promise for table in TABLES for promise in table.PROMISES]

# All but what reads and writes files, watches a run or is a command.
ROOMS = (
    r"(objectives|models|tasks|evaluation)/.*",
    r"data/(features|images|pipeline|text)",  # The others hold encoded pictures.
    r"parallel/(rows|exchange|mesh|sharding)",
    r"decoding/.*|optimizer|params|step",
)

# What an annotation may consist of that speaks of no array. A bare dict may hold some.
PLAIN = {
    *(
        "str",
        "int",
        "float",
        "bool",
        "bytes",
        "None",
        "dict[",
        "list",
        "tuple",
        "type",
        "Sequence",
        "Iterator",
        "Tokens",
    ),
    *("Path", "Image", "Generator", "ConfigDict", "Module", "Device", "Mesh", "AbstractMesh"),
    *("NamedSharding", "PartitionSpec"),
}

# What takes and gives no arrays, although its annotations are not plain.
NOT_ARRAYS = {
    # Of a tree it looks at the paths alone.
    *("optimizer.decay_table", "tasks.common.Task.rate_table", "tasks.stage1.Stage1.rate_table"),
    # Pictures are encoded bytes, or only spoken of.
    *("tasks.common.Task.source", "tasks.common.Task.view", "tasks.common.Task.feature_plan"),
    *("tasks.common.Task.filters", "data.features.FeaturePlan.facts"),
    *("data.pipeline.order_identity", "data.pipeline.check_order"),
    # Protocols, and what makes functions of arrays, which the loop's own promises go through.
    *("decoding.lines.Choice.start", "decoding.lines.Choice.choose", "decoding.lines.Choice.finish"),
    *("decoding.writers.decoder", "decoding.writers.encoder_decoder", "decoding.writers.qformer"),
    *("decoding.writers.writer_of", "decoding.lines.write"),
    *("tasks.common.Batches.collate", "tasks.common.Batches.schema"),
    # It builds what has functions of arrays.
    *("models.vision.build", "models.vision.is_ours", "parallel.rows.rows_of"),
    *("tasks.create", "tasks.stage1.Stage1.objective", "tasks.stage2.Stage2.objective"),
    *("tasks.stage1.Stage1.batches", "tasks.stage2.Stage2.batches", "data.features.batch_dtype"),
    *("tasks.common.Task.caption_tokenizer", "tasks.stage2.Stage2.tokenizer"),
    "tasks.common.Task.evaluation_layout",
    # Texts and numbers of them.
    *("evaluation.vqa.accuracy", "evaluation.vqa.lemmatizer", "evaluation.results.rows", "evaluation.results.write"),
    # Settings alone.
    *("models.lora.resolve", "models.lora.check_same"),
}


def public_functions() -> Iterator[Callable]:
    """Functions and methods of the modules in ROOMS."""
    package = pathlib.Path(blip2_jax.__file__).parent
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).with_suffix("").as_posix()
        if not re.fullmatch("|".join(ROOMS), path):
            continue
        module = importlib.import_module(f"blip2_jax.{path.replace('/', '.').removesuffix('.__init__')}")
        for name, member in vars(module).items():
            if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
                continue
            members = methods(member) if inspect.isclass(member) else [inspect.unwrap(member)]
            yield from filter(inspect.isfunction, members)


def methods(cls: type) -> Iterator[Callable]:
    """What a class defines itself, of a property what computes it; without what subclasses or Flax complete."""
    for name, member in vars(cls).items():
        if name.startswith("_") and name not in ("__call__", "__getitem__"):
            continue
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, functools.cached_property):
            member = member.func
        if name != "setup" and not getattr(member, "__isabstractmethod__", False):
            yield inspect.unwrap(member)


def may_have_arrays(function: Callable) -> bool:
    """Unless every annotation is there and plain."""
    signature = inspect.signature(function)
    annotations = [x.annotation for x in signature.parameters.values() if x.name != "self"]
    words = {
        word.rpartition(".")[2]
        for annotation in (*annotations, signature.return_annotation)
        for word in re.findall(r"dict\[|[a-zA-Z][\w.]*", annotation if isinstance(annotation, str) else "unknown")
    }
    return not words <= PLAIN


@pytest.mark.parametrize(
    ("promise", "mesh"),
    [
        pytest.param(promise, mesh, id=f"{promise}{' on a mesh' if mesh else ''}")
        for promise in PROMISES
        for mesh in promise.meshes
    ],
)
def test_shapes_and_dtypes(promise, mesh, folder, own_cache):
    complain = lambda found, promised: f"found {found}, promised {promised}"
    found, promised = promise.found(folder, mesh), made(promise.gives, folder)
    chex.assert_trees_all_equal_comparator(operator.eq, complain, found, promised)


def test_every_public_function_of_arrays_has_a_promise():
    promised = {name_of(promise.function) for promise in PROMISES}
    needed = {name_of(function) for function in public_functions() if may_have_arrays(function)}
    silent = needed - promised - NOT_ARRAYS
    assert not silent, f"no shape test, see tests/shapes/promises.py: {', '.join(sorted(silent))}"
    idle = NOT_ARRAYS - needed | NOT_ARRAYS & promised
    assert not idle, f"needlessly in NOT_ARRAYS: {', '.join(sorted(idle))}"


def test_every_letter_has_a_length_of_its_own():
    found = [length for letter, length in vars(lengths).items() if len(letter) == 1]
    assert len(set(found)) == len(found) > 0
