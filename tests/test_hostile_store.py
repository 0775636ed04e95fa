"""Collections that nothing of npclip wrote: StoreError, never anything else."""

import hashlib
import json
import struct

import numpy as np
import pytest

from npclip.errors import StoreError
from npclip.provenance import Provenance
from npclip.store import Reader, Writer

PROVENANCE = Provenance("tiny", "0" * 64, "float32", "shortest 16 bicubic", True, 4, "0.1.0")
DEEP = "[" * 100_000


def write(folder, close=True):
    writer = Writer(folder, PROVENANCE, "image", format="npy")
    writer.append(["a", "b"], ["A", "B"], np.ones((2, 4), np.float32))
    writer.fail("c", "C", "broken")
    if close:
        writer.close()
    else:  # as kill -9 leaves it
        writer._journal.close()
        writer._lock.release()


def open_both(folder):
    """What a Reader and a Writer do with it, to the end."""
    with Reader(folder) as reader:
        reader.rows(range(len(reader)))
        list(reader.blocks())
        reader.pending  # noqa: B018
    with Writer(folder, PROVENANCE, "image", format="npy"):
        pass


@pytest.mark.parametrize("text", [DEEP, "{", "[]", "null", '{"version": 1}'])
def test_collection_json(tmp_path, text):
    write(tmp_path)
    (tmp_path / "collection.json").write_text(text)
    with pytest.raises(StoreError):
        open_both(tmp_path)


@pytest.mark.parametrize("dimension", [0, -1, 1 << 21, 1 << 31, 1 << 63, 1 << 70])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_dimensions(tmp_path, dimension, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    write(tmp_path)
    path = tmp_path / "collection.json"
    values = json.loads(path.read_text()) | {"format": format}
    values["provenance"]["dimension"] = dimension
    path.write_text(json.dumps(values))
    with pytest.raises(StoreError, match="embeddings of length"):
        Reader(tmp_path)


@pytest.mark.parametrize("header", [b"{'descr': (", b"{" * 90, b"(((((", b"'''", b"\\", b"{[}]"])
def test_headers_of_npy(tmp_path, header):
    write(tmp_path)
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    (tmp_path / "part-00000.npy").write_bytes(data)
    with pytest.raises(StoreError):
        open_both(tmp_path)


@pytest.mark.parametrize("line", [DEEP, "[]", '{"id": 1}', '{"id": "\\ud800", "path": ""}', "x"])
def test_ids(tmp_path, line):
    write(tmp_path)
    (tmp_path / "part-00000.ids.jsonl").write_text(f"{line}\n" * 2)
    with pytest.raises(StoreError):
        open_both(tmp_path)


@pytest.mark.parametrize("line", [DEEP, "[]", '{"id": 1}', '{"id": "\\ud800"}', "x"])
def test_errors(tmp_path, line):
    write(tmp_path)
    (tmp_path / "errors.jsonl").write_text(f"{line}\n" * 2)
    with pytest.raises(StoreError, match="line 1"):
        open_both(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        *("x", DEEP, "null", "1", "[]", "[[]]", '[["a", "b"]]', '[["a", "b"], ["A"]]', '"ab"'),
        *('[["a", "b"], [1, 2]]', '[["a", "\\ud800"], ["A", "B"]]', '["ab", "AB"]'),
        '[{"a": 1, "b": 2}, ["A", "B"]]',
    ],
)
def test_journals_with_a_right_digest(tmp_path, names):
    write(tmp_path, close=False)
    content = struct.pack("<II", 2, len(names)) + names.encode() + bytes(2 * 4 * 2)
    digest = hashlib.blake2b(content, digest_size=16).digest()
    (tmp_path / "part-00000.journal").write_bytes(digest + content)
    with pytest.raises(StoreError, match="broken"):
        open_both(tmp_path)
    with pytest.raises(StoreError, match="broken"):
        Writer(tmp_path, PROVENANCE, "image", format="npy")


def test_a_whole_one(tmp_path):
    write(tmp_path, close=False)
    open_both(tmp_path)
    assert json.loads((tmp_path / "errors.jsonl").read_text())["id"] == "c"
    assert len(Reader(tmp_path)) == 2
