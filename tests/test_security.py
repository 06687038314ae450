"""What comes from outside runs no code, writes no file elsewhere, and leaves no password in what a run writes."""

import ast
import io
import json
import pathlib
import pickle
import struct
import tarfile
import traceback
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest

import blip2_jax
from blip2_jax.checkpoints import downloads, huggingface
from blip2_jax.checkpoints.torch_file import TorchFile
from blip2_jax.data import mixture
from blip2_jax.data.sources import names, open_source, tar
from blip2_jax.data.sources.webdataset import cache_directory
from tests import tiny

PACKAGE = pathlib.Path(blip2_jax.__file__).parent

# Calls that run what they are given, or unpickle it, wherever it comes from.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("tarfile.TarFile.extract", "tarfile.TarFile.extractall", "shutil.unpack_archive"),
}
# Of a call by the end of its name: what must be said with it, or must not.
REQUIRED = {
    "torch.load": ("weights_only", True),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
}
NEVER = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}
# The one archive that is unpacked: a wheel whose SHA-256 is in the package, by zipfile, which stays in its folder. And
# what is a program by its nature, a recipe: the package's own, or the one that the user has named with --config.
ALLOWED = {"checkpoints/downloads.py": "archive.extractall", "configuration.py": "runpy.run_path"}


def dotted(node: ast.expr) -> str:
    """ "a.b.c" of a call's function, with what is not a name left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str, where: str) -> Iterator[str]:
    """What in a module's text is not allowed, by line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, here = dotted(node.func), f"{where}:{node.lineno}"
        said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if (name in FORBIDDEN or name.endswith((".extract", ".extractall"))) and ALLOWED.get(where) != name:
            yield f"{here}: {name}"
        for ending, (option, value) in REQUIRED.items():
            if name == ending and said.get(option) is not value:
                yield f"{here}: {name} without {option}={value}"
        yield from (f"{here}: {option}={value}" for option, value in NEVER.items() if said.get(option) is value)


def test_the_package_calls_nothing_that_runs_what_it_reads():
    found = [
        violation
        for file in sorted(PACKAGE.rglob("*.py"))
        for violation in violations(file.read_text(), file.relative_to(PACKAGE).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        *("eval(text)", "pickle.load(file)", "yaml.load(text, Loader=L)", "torch.load(file)", "os.system(x)"),
        *("torch.load(file, weights_only=False)", "np.load(file, allow_pickle=True)", "archive.extractall(folder)"),
        *("AutoTokenizer.from_pretrained(d)", "AutoModel.from_pretrained(d, trust_remote_code=True)"),
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_walk_finds_what_it_is_to_find(line):
    assert list(violations(line, "module.py"))


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> pathlib.Path:
    return tmp_path / "the payload ran"


def test_an_array_of_objects_is_not_unpickled(mark, tmp_path, own_cache):
    """In the cache of a source's index, the one place where arrays are read from files of numpy."""
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for name, content in (("a.txt", b"a cat"), ("a.jpg", b"no picture")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    open_source(f"webdataset:{shard}")
    (index,) = (cache_directory() / "sources").glob("*.npy")
    with index.open("wb") as stream:
        np.save(stream, np.array([Payload(mark)], object), allow_pickle=True)
    for file in (cache_directory() / "sources").glob("*"):
        if file != index:
            file.unlink()
    with pytest.raises(ValueError, match="allow_pickle=False"):
        open_source(f"webdataset:{shard}")
    assert not mark.exists()


@pytest.mark.torch
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_checkpoint_of_torch_with_a_payload_is_refused(mark, tmp_path, as_zip):
    import torch

    file = tmp_path / "model.pth"
    torch.save(
        {"model": {"weight": torch.zeros(2), "more": Payload(mark)}}, file, _use_new_zipfile_serialization=as_zip
    )
    with pytest.raises(ValueError, match=r"holds more than tensors.*unpickling it could run code"):
        TorchFile(file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        huggingface.Directory(renamed(file, "pytorch_model.bin"))
    assert not mark.exists()
    torch.load(renamed(file, "model.pth") / "model.pth", weights_only=False)
    assert mark.exists()  # It would have run.


def renamed(file: pathlib.Path, name: str) -> pathlib.Path:
    """A folder with this file alone, by another name."""
    folder = file.parent / f"with {name}"
    folder.mkdir()
    (folder / name).write_bytes(file.read_bytes())
    return folder


def test_a_pickle_by_the_name_of_safetensors_is_refused(mark, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="not a safetensors file"):
        huggingface.Directory(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("elsewhere", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_of_weights_names_files_beside_it(tmp_path, elsewhere):
    index = {"weight_map": {"weight": elsewhere}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        huggingface.Directory(tmp_path)


def test_code_that_a_tokenizer_brings_is_neither_asked_about_nor_run(mark, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Mine: pass\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        huggingface.load_tokenizer(folder)
    assert not mark.exists()
    config = {"model_type": "opt", "auto_map": {"AutoConfig": "code.Mine"}}
    assert huggingface.complete(config)["model_type"] == "opt"
    assert not mark.exists()


def test_a_wheel_stays_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(tmp_path / "deep" / "cache"))
    wheel = tmp_path / "deep" / "cache" / "downloads" / "evil-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/weights", "w")
        archive.writestr("../../../../../escaped", "x")
        archive.writestr(f"{tmp_path}/absolute", "x")
        link = zipfile.ZipInfo("model/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path))
    package = downloads.Package(
        *("evil", "1.0", wheel.name, downloads.file_sha256(wheel), 1, "evil"),
        unpack=lambda folder, output: (folder / "model").rename(output),
    )
    unpacked = downloads.fetch(package)
    assert not (unpacked / "link").is_symlink()
    assert {path.name for path in tmp_path.rglob("*")} == {
        "deep",
        "cache",
        "downloads",
        wheel.name,
        "evil",
        "weights",
        "link",
    }


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Of a tar member, with the right checksum."""
    block = bytearray(struct.pack("100s8s8s8s12s12s8sc", name, b"644", b"0", b"0", size, b"0", b" " * 8, kind))
    block.extend(b"\0" * (512 - len(block)))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(line: bytes) -> bytes:
    return header(b"x", b"%011o" % len(line), b"x") + line.ljust(512, b"\0") + header(b"a.jpg", b"0")


@pytest.mark.parametrize(
    "content",
    [
        header(b"a.jpg", b"-1000"),
        extended(b"0 a=b\n"),
        extended(b"-6 a=b\n"),
        extended(b"\xb2 a=b\n"),
        extended(b"14 size=-1024\n"),
        extended(b"11 size=1_0\n"),
    ],
)
def test_a_tar_archive_that_leads_back_to_itself_is_damaged(content):
    content += bytes(1024)
    with pytest.raises(ValueError, match="tar header"):
        for number, _ in enumerate(tar.members(lambda start, length: content[max(start, 0) :][:length], len(content))):
            assert number < 100


def test_members_that_point_elsewhere_are_names_and_nothing_else(tmp_path, own_cache):
    """Shards are never unpacked: ../ in a name is a part of a key, and a link is no file."""
    shard = tmp_path / "shards" / "shard.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for name in ("../../escaped.txt", "../../escaped.jpg", "/absolute.txt", "/absolute.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    source = open_source(f"webdataset:{shard}")
    assert len(source) == 2
    assert [source[index]["image"] for index in range(2)] == [b"x", b"x"]
    assert {path.name for path in tmp_path.rglob("*")} == {"shards", "shard.tar"}


SECRET = "hunter2-do-not-tell"
ADDRESSES = [
    f"webdataset:https://me:{SECRET}@host.org/{{00..11}}.tar",
    f"webdataset:https://{SECRET}@host.org/00.tar@0.5 + folder:pictures@0.5",
    f"webdataset:https://b.s3.amazonaws.com/0.tar?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"webdataset:https://storage.googleapis.com/b/0.tar?text=a&x-goog-signature={SECRET}",
    f"webdataset:https://a.blob.core.windows.net/b/0.tar?sv=1&sig={SECRET}",
    f"hf:data?token={SECRET}",
]


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("read", [names.parse, mixture.parse_mixture, open_source])
def test_a_source_with_a_password_is_refused_and_not_told(name, read):
    with pytest.raises(ValueError, match=r"looks like a password or a signature") as refused:
        read(name)
    assert SECRET not in "".join(traceback.format_exception_only(refused.value))


@pytest.mark.parametrize(
    "name", ["webdataset:gs://bucket/a@b/{00..11}.tar", "hf:data?text=caption&split=train", "folder:me@home/token=x"]
)
def test_what_is_no_password_is_a_name(name):
    assert names.parse(name)


def test_a_run_with_a_password_in_its_source_writes_it_nowhere(folder, own_cache, tmp_path, capsys):
    from blip2_jax import trainer

    config = tiny.recipe("stage1", folder, **{"data.train": ADDRESSES[0]})
    with pytest.raises(ValueError, match="looks like a password") as refused:
        trainer.train(config, tmp_path / "run")
    assert SECRET not in str(refused.value)
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET in path.read_text(errors="replace")]
