"""The real step of recipes, compiled ahead of time: for fake devices here, and for TPUs where libtpu is installed."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import ahead_of_time, params, plan
from blip2_jax.parallel import chips, hlo, sharding
from blip2_jax.parallel import mesh as meshes
from tests import tiny
from tests.test_configs import recipe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)


@pytest.fixture(autouse=True)
def compile_fast():
    """Nothing that is compiled here runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compile_well(compile_fast):
    """As for a run."""
    jax.config.update("jax_disable_most_optimizations", False)


KEYS = {
    *("topology", "chips", "mesh", "batch_size", "fits", "hbm_peak_bytes", "hbm_limit_bytes", "argument_bytes"),
    *("temporary_bytes", "output_bytes", "program_bytes", "flops", "flops_by_part", "flops_executed"),
    *("compile_seconds", "steps", "collectives", "network_bytes", "slices_bytes", "traffic_bytes", "unknown_loops"),
    *("step_seconds_estimate", "step_seconds_in_turn", "bound", "seconds", "mfu", "images_per_second_per_chip"),
    "chip_hours",
}


def tiny_recipe(stage, folder, **changes):
    """Every row takes part in everything, so that devices may have one; few layers in a loop compile faster."""
    shares = {"objective.itm_share": 1.0, "objective.itg_share": 1.0} if stage == "stage1" else {}
    return tiny.recipe(stage, folder, **{"model.unroll": 1, "model.layers": 2, **shares, **changes})


def dry_run(stage, folder, **changes):
    return plan.make_plan(tiny_recipe(stage, folder, **changes), jax.devices()[:8])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_dry_run(stage, folder, own_cache):
    found = dry_run(stage, folder, batch_size=16, mesh="data=2,fsdp=2,tensor=2")
    assert found.keys() == KEYS
    assert (found["topology"], found["chips"], found["steps"]) == ("cpu:8", 8, 6)
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    memory = ("argument_bytes", "temporary_bytes", "output_bytes", "program_bytes")
    assert found["hbm_peak_bytes"] == sum(found[name] for name in memory)
    assert found["flops"] == sum(found["flops_by_part"].values()) <= found["flops_executed"]
    # Gradients of what every device has are added up, at the least.
    assert any(item["kind"] == "all-reduce" for item in found["collectives"])
    assert found["network_bytes"] == pytest.approx(
        sum(item["bytes_sent"] * item["count"] for item in found["collectives"])
    )
    for unknown in ("fits", "hbm_limit_bytes", "step_seconds_estimate", "mfu", "chip_hours"):
        assert found[unknown] is None, unknown
    json.dumps(found)
    assert "no limit known" in plan.table(found)


def test_a_device_holds_its_share(folder, own_cache):
    """The arguments of a device are its shards of parameters, optimizer and batch, and nothing else."""
    config = tiny_recipe("stage2", folder, mesh="data=2,fsdp=2,tensor=2")
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:8])
    task = ahead_of_time.create_task(config, None)
    step, arguments = ahead_of_time.abstract_step(task, mesh)
    compiled = ahead_of_time.compile_step(step, arguments, mesh)
    trainable = params.flatten(sharding.specs(task.shapes(), mesh))
    state = arguments[0]
    assert {path: leaf.sharding.spec for path, leaf in params.flatten(state.trainable).items()} == trainable
    shares = [
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.trainable, arguments[1], arguments[2]))
    ]
    moments = 2 * sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4 for leaf in jax.tree.leaves(state.trainable)
    )
    # And a few scalars; what a step does not read is no argument of the compiled program.
    assert compiled.argument_bytes == pytest.approx(sum(shares) + moments, rel=0.02)
    assert "vision" not in arguments[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": "data=3"}, "mesh 'data=3' does not fit 8 devices"),
        ({"mesh": "rows=8"}, "mesh 'rows=8': expected AXIS=SIZE"),
        ({"batch_size": 12}, "batch_size 12 does not divide over data x fsdp = 8 devices"),
        ({"pieces": 2}, "batch_size 8 gives each of data x fsdp = 8 devices 1 rows: expected a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_compiled(changes, message, folder, own_cache):
    with pytest.raises(ValueError, match=re.escape(message)):
        dry_run("stage1", folder, **changes)


def test_the_command(folder, own_cache, tmp_path, capsys):
    arguments = {"devices": "cpu:8", "mesh": "data=4,fsdp=2", "steps": 7, "json": str(tmp_path / "plan.json")}
    plan.run(tiny_recipe("stage2", folder), **arguments)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["mesh"], found["steps"]) == ({"data": 4, "fsdp": 2, "tensor": 1}, 7)
    assert "mesh data=4,fsdp=2,tensor=1, batch 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either --topology=CHIP:SIDES or --devices=cpu:N"),
        ({"topology": "v5e:2x2", "devices": "cpu:8"}, "either --topology=CHIP:SIDES or --devices=cpu:N"),
        ({"devices": "gpu:8"}, "--devices=gpu:8: expected cpu:N"),
        ({"devices": "cpu:8", "slices": 2}, "--slices goes with --topology"),
        ({"topology": "v5e:big"}, "topology 'v5e:big': expected CHIP:SIDES"),
    ],
)
def test_flags_that_make_no_sense(values, message, folder, own_cache):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.run(tiny_recipe("stage1", folder), **values)


def test_without_libtpu_the_error_says_what_to_install(folder, own_cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs libtpu, but no TPU: pip install 'jax\[tpu\]'"):
        plan.run(tiny_recipe("stage1", folder), topology="v5e:2x2")


@pytest.mark.parametrize(
    ("message", "required"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.33G) "
            "exceeds available HBM (15.75G).",
            int(19.33 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of "
            "15.75G hbm. Exceeded hbm capacity by 4.75G.",
            int(20.5 * 2**30),
        ),
        ("INTERNAL: something else (19.33G)", None),
    ],
)
def test_a_program_that_is_too_large(message, required, folder, own_cache, monkeypatch):
    """Its plan says by how much; another failure of the compiler is no plan."""

    def refuse(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    if required is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            dry_run("stage1", folder)
        return
    topology = chips.parse_topology("v5e:2x4")
    found = plan.make_plan(tiny_recipe("stage1", folder), jax.devices()[:8], topology)
    assert found.keys() == KEYS
    assert (found["fits"], found["hbm_peak_bytes"]) == (False, required)
    assert found["collectives"] is found["step_seconds_estimate"] is None
    assert found["argument_bytes"] > 0
    assert "DOES NOT FIT" in plan.table(found)


def test_stand_ins_for_tokenizers():
    """A published model's step needs no tokenizer: prompts count one token a word."""
    config = recipe("stage2", "opt_2_7b")
    config.data.prompt, config.data.begin = "a photo of", "</s>"
    task = ahead_of_time.create_task(config, jnp.bfloat16)
    assert task.schema()["prompt_ids"].shape == (config.batch_size, 1 + 3)
    assert task.tokenizer.begin == [0]
    task = ahead_of_time.create_task(recipe("stage1", "eva_g"), jnp.bfloat16)
    assert task.caption_tokenizer.decoder_start == 30522
    assert {leaf.dtype for leaf in jax.tree.leaves(task.frozen_shapes())} == {jnp.dtype(jnp.bfloat16)}


def test_tokenizers_that_are_here_are_used(folder, own_cache):
    task = ahead_of_time.create_task(tiny_recipe("stage2", folder), None)
    assert task.schema()["prompt_ids"].shape[1] == len(task.tokenizer.encode_prompt("A drawing of")) > 3


# Programs for TPUs.


def weight_gradients(program, tree, shards=1):
    """Products as large as a parameter of `tree` or a device's share of it, of one layer where layers are stacked.

    Activations must have other sizes than these.
    """
    sizes = set()
    for path, leaf in params.flatten(tree).items():
        shape = leaf.shape[1:] if re.search(r"(^|/)(blocks|layers|encoder|decoder)/", path) else leaf.shape
        if len(shape) > 1:
            sizes |= {int(np.prod(shape)), int(np.prod(shape)) // shards}
    products = [item for item, _, _ in program.instructions() if item.opcode in ("dot", "convolution")]
    return [item for item in products if int(np.prod(item.results[0].shape)) in sizes]


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_of_weights_are_found(trained):
    """What the test below looks for is seen where it is there."""
    x, w = jax.ShapeDtypeStruct((5, 24), jnp.float32), {"up": jax.ShapeDtypeStruct((24, 40), jnp.float32)}
    loss = lambda x, w: jnp.sin(x @ w["up"]).sum()
    step = jax.jit(jax.grad(loss, argnums=1 if trained else 0))
    program = hlo.parse(step.lower(x, w).compile().as_text())
    assert bool(weight_gradients(program, w)) == trained


@needs_libtpu
@pytest.mark.parametrize(
    ("stage", "name", "slices"), [("stage1", "v5e:2x2", 1), ("stage2", "v4:2x2x1", 1), ("stage2", "v5e:2x2", 2)]
)
def test_a_tiny_step_for_tpus(stage, name, slices, folder, own_cache):
    topology = chips.parse_topology(name, slices)
    config = tiny_recipe(stage, folder)
    found = plan.make_plan(config, topology.devices(), topology)
    assert found.keys() == KEYS
    assert found["fits"] is True
    assert 0 < found["hbm_peak_bytes"] <= found["hbm_limit_bytes"] == topology.chip.hbm_limit_bytes
    assert found["step_seconds_estimate"] == max(found["seconds"].values()) > 0
    assert 0 < found["mfu"] <= 1
    assert found["chip_hours"] == pytest.approx(6 * found["step_seconds_estimate"] * topology.count / 3600)
    assert (found["slices_bytes"] > 0) == (slices > 1)
    assert "fits" in plan.table(found)


@needs_libtpu
def test_a_slice_that_there_is_not():
    with pytest.raises(ValueError, match="topology 'v5e:3x3': libtpu has no such slice"):
        chips.parse_topology("v5e:3x3").devices()


PUBLISHED = [
    ("stage1", "eva_g"),
    ("stage2", "opt_2_7b"),
    ("stage2", "opt_6_7b"),
    ("stage2", "flan_t5_xl"),
    ("stage2", "flan_t5_xxl"),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:16x16", "v4:4x4x4"])
@pytest.mark.parametrize(("stage", "variant"), PUBLISHED, ids=[variant for _, variant in PUBLISHED])
def test_a_published_recipe_fits(stage, variant, topology, compile_well):
    pod = chips.parse_topology(topology)
    found = plan.make_plan(recipe(stage, variant), pod.devices(), pod)
    print(plan.table(found))
    assert found["fits"] is True
    assert all("language_modeling_loss" in loop for loop in found["unknown_loops"])


@needs_libtpu
@pytest.mark.slow
def test_the_program_of_stage_1_on_256_chips(compile_well):
    """No similarities of all with all, no gathered image tokens, no gradient of a frozen weight."""
    config = recipe("stage1", "eva_g")
    mesh = meshes.make_mesh(config.mesh, chips.parse_topology("v5e:16x16").devices())
    task = ahead_of_time.create_task(config, jnp.bfloat16)
    step, arguments = ahead_of_time.abstract_step(task, mesh)
    compiled = ahead_of_time.compile_step(step, arguments, mesh)
    assert compiled.text is not None, f"needs {compiled.peak_bytes / 2**30:.2f} GiB"
    program = hlo.parse(compiled.text)
    arrays = [array for item, _, _ in program.instructions() for array in item.results]
    batch, tokens = config.batch_size, task.encoder.tokens
    assert not [str(array) for array in arrays if array.shape.count(batch) > 1]
    assert not [str(array) for array in arrays if batch in array.shape and tokens in array.shape]
    gathered = [
        str(array)
        for item, _, _ in program.instructions()
        if item.opcode.startswith(("all-gather", "all-reduce", "reduce-scatter"))
        for array in item.results
        if tokens in array.shape
    ]
    assert not gathered
    assert not [item.origin for item in weight_gradients(program, task.frozen_shapes())]
