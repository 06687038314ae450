"""Parquet files as the hub has them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny

PICTURE = tiny.picture()


def write(file, columns, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)


def read(name):
    source, found = sources.open_source(name), {}
    for index in range(len(source)):
        try:
            record = source[index]
            found[record["key"]] = record["captions"]
        except BadRecord as problem:
            found[problem.where] = problem.reason
    return found


def test_rows(tmp_path):
    source = sources.open_source(tiny.parquet(tmp_path))
    assert source[4] == {
        "key": "data/train-00001-of-00002.parquet, row 1",
        "image": tiny.picture(4),
        "captions": ["picture 4", "colour number 4"],
    }
    for index in (-1, 6):
        with pytest.raises(IndexError, match="there are 6 records"):
            source[index]


def test_a_row_group_is_read_once_by_a_thread(tmp_path, monkeypatch):
    source = sources.open_source(tiny.parquet(tmp_path))
    opened = []
    original = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    for index in range(len(source)):
        source[index]
    assert len(opened) == 4


@pytest.mark.parametrize("captions", [["a", "b"], [["a"], ["b", "c"]], pa.array(["a", "b"]).dictionary_encode()])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_types_of_columns(tmp_path, captions, kind):
    write(tmp_path / "0.parquet", {"jpg": pa.array([PICTURE] * 2, kind), "number": [1, 2], "label": captions})
    expected = pa.array(captions).to_pylist() if isinstance(captions, list) else ["a", "b"]
    found = [[value] if isinstance(value, str) else value for value in expected]
    assert list(read(f"hf:{tmp_path}").values()) == found


def test_chosen_columns(tmp_path):
    columns = {"first": [PICTURE], "second": [b"other"], "caption": ["short"], "long": ["a long one"]}
    write(tmp_path / "0.parquet", columns)
    with pytest.raises(
        ValueError, match=r"expected a column of images; name it with \?image=COLUMN; can be: first, second"
    ):
        sources.open_source(f"hf:{tmp_path}")
    record = sources.open_source(f"hf:{tmp_path}?image=first&text=long")[0]
    assert (record["image"], record["captions"]) == (PICTURE, ["a long one"])
    assert sources.open_source(f"hf:{tmp_path}?image=first")[0]["captions"] == ["short"]
    with pytest.raises(
        ValueError, match=r"expected the column number of texts; .*can be: caption, long; there are first \(bin"
    ):
        sources.open_source(f"hf:{tmp_path}?image=first&text=number")


def test_addresses_are_no_images(tmp_path):
    write(tmp_path / "0.parquet", {"url": ["http://x"], "caption": ["a"]})
    with pytest.raises(
        ValueError, match=r"can be: none; .*Addresses of images must be fetched first, such as with img2dat"
    ):
        sources.open_source(f"hf:{tmp_path}")


def test_splits(tmp_path):
    names = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001")
    for name in (*names, "default/test/0000", "training", "train"):
        write(tmp_path / f"{name}.parquet", {"image": [PICTURE], "text": [name]})
    split = lambda pattern: [captions[0] for captions in read(f"hf:{tmp_path}?split={pattern}").values()]
    assert split("train") == [*names[:2], "train"]
    assert split("test") == ["default/test/0000"]
    assert split("train-00001*") == [names[1]]
    assert split("[tv]*") == [*names, "default/test/0000", "train", "training"]
    with pytest.raises(
        FileNotFoundError, match=r"no file is of split=dev; there are data/train-00000-of-00002\.parquet, "
    ):
        sources.open_source(f"hf:{tmp_path}?split=dev")


def test_bad_rows(tmp_path):
    images = [{"bytes": PICTURE, "path": None}] * 4 + [{"bytes": None, "path": "a.jpg"}, None]
    not_utf8 = pa.array([b"ok", None, b" ", b"caf\xe9", b"x", b"y"]).cast(pa.binary()).view(pa.string())
    write(tmp_path / "0.parquet", pa.table({"image": images, "caption": not_utf8}))
    assert list(read(f"hf:{tmp_path}").values()) == [
        ["ok"],
        "caption_missing",
        "caption_empty",
        "caption_not_utf8",
        "missing",
        "missing",
    ]


def test_a_damaged_row_group(tmp_path):
    """Its rows are bad, the others are not."""
    write(
        tmp_path / "0.parquet", {"image": [PICTURE] * 4, "caption": list("abcd")}, row_group_size=2, compression="zstd"
    )
    group = pq.read_metadata(tmp_path / "0.parquet").row_group(0).column(0)
    content = bytearray((tmp_path / "0.parquet").read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    (tmp_path / "0.parquet").write_bytes(content)
    assert list(read(f"hf:{tmp_path}").values()) == ["unreadable", "unreadable", ["c"], ["d"]]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: (d / "1.parquet").write_bytes(b"nothing"),
            r"1\.parquet is no whole parquet file .*download it again",
        ),
        (
            lambda d: write(d / "1.parquet", {"img": [PICTURE], "text": ["x"]}),
            r"1\.parquet has no column image, which 0",
        ),
        (lambda d: [file.unlink() for file in d.iterdir()], "there is no parquet file in it"),
        (lambda d: write(d / "0.parquet", pq.read_table(d / "0.parquet").slice(0, 0)), "holds no record"),
    ],
)
def test_bad_files(tmp_path, break_it, message):
    write(tmp_path / "0.parquet", {"image": [PICTURE], "text": ["x"]})
    break_it(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        sources.open_source(f"hf:{tmp_path}")
