"""How a source is named: KIND:WHAT, with options behind a question mark as in a URL, and patterns of shards."""

from __future__ import annotations

import pathlib
import re
import urllib.parse

# A question mark that does not introduce an option is one of a pattern of files, as in "shard-0?.tar".
_NAME = re.compile(r"(?P<kind>\w+):(?P<what>.*?)(?:\?(?P<options>\w+=.*))?", re.DOTALL)
# A user before the host, or what clouds call the parts of a signed address: X-Amz-Signature, X-Goog-Signature, sig, ...
_USER = re.compile(r"://(?P<secret>[^/?#@]+)@")
_SIGNED = re.compile(
    r"[?&](?:x-(?:amz|goog)-[\w-]+|sig|signature|token|access_?token|api_?key|awsaccesskeyid|googleaccessid|password)"
    r"=(?P<secret>[^&]*)",
    re.IGNORECASE,
)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def parse(name: str) -> tuple[str, str, dict[str, str]]:
    """ "coco:a.json+images?split=train,val" to ("coco", "a.json+images", {"split": "train,val"}).

    Values of options may be percent-encoded.

    Raises:
      ValueError: it is no such name, an option is empty or given twice, or it holds a password or the like.
    """
    refuse_secrets(name)
    found = _NAME.fullmatch(name)
    if not found or not found["what"]:
        raise ValueError(f"data source {name!r}: expected KIND:WHAT, such as folder:my_pictures or nano:train")
    options: dict[str, str] = {}
    for part in (found["options"] or "").split("&"):
        option, _, value = part.partition("=")
        if part and (not option or not value or option in options):
            raise ValueError(f"data source {name!r}: expected ?OPTION=VALUE&OPTION=VALUE, each once, found {part!r}")
        if part:
            options[option] = urllib.parse.unquote(value)
    return found["kind"], found["what"], options


def refuse_secrets(name: str) -> None:
    """A source is written into configurations, checkpoints, corpora and logs, so what is secret has no place in it.

    Raises:
      ValueError: a name, or a mixture of names, holds an address with a password or a signature, which is not told.
    """
    found = [match for pattern in (_USER, _SIGNED) for match in pattern.finditer(name)]
    if not found:
        return
    shown = name
    for start, end in sorted((match.span("secret") for match in found), reverse=True):
        shown = f"{shown[:start]}***{shown[end:]}"
    raise ValueError(
        f"data source {shown!r}: what is *** here looks like a password or a signature, and a source is written into "
        "configurations, checkpoints and logs. Give it to fsspec in its configuration (~/.config/fsspec/*.json, or "
        "FSSPEC_... in the environment), or to the cloud's own tools (gcloud auth, AWS_PROFILE)"
    )


def split_files(kind: str, what: str, *expected: str) -> list[pathlib.Path]:
    """ "a.json+b.json+images" to its paths: JSON files, which must exist, and last the folder of the images.

    A plus sign separates behind ".json" only, so it may stand in the name of a folder.

    Args:
      kind: of the source, for errors.
      what: the string.
      expected: what each part is, for errors, such as "ANNOTATIONS.json", "IMAGES".

    Raises:
      ValueError: there are more or fewer parts.
      FileNotFoundError: one of them is not there.
    """
    parts = re.split(r"(?<=\.json)\+", what)
    if len(parts) != len(expected):
        raise ValueError(f"{kind}:{what}: expected {kind}:{'+'.join(expected)}, found {len(parts)} of these parts")
    paths = [pathlib.Path(part).expanduser() for part in parts]
    for path, name in zip(paths[:-1], expected[:-1], strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"{kind}:{what}: {path} is no file; expected {name} there")
    if not paths[-1].is_dir():
        raise FileNotFoundError(
            f"{kind}:{what}: {paths[-1]} is no folder; expected the images there, as {kind}:{'+'.join(expected)}"
        )
    return paths


def expand_braces(pattern: str) -> list[str]:
    """ "{08..10}.tar" to 08.tar, 09.tar and 10.tar, and "{a,b}.tar" to a.tar and b.tar, as a shell does.

    Raises:
      ValueError: braces that hold neither a rising range nor a list.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers, names = _RANGE.fullmatch(found[1]), found[1].split(",")
    if numbers:
        first, last = numbers.groups()
        names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if len(names) < 2 and not (numbers and names):
        raise ValueError(f"{pattern!r}: expected {{FIRST..LAST}} or {{ONE,OTHER}} in braces, found {found[0]}")
    before, behind = pattern[: found.start()], pattern[found.end() :]
    return [expanded for name in names for expanded in expand_braces(before + name + behind)]
