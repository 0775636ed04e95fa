"""Collections of embeddings: whatever happens to the writer, every row is there exactly once."""

import builtins
import errno
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npclip.errors import (
    BackendError,
    InputError,
    InputTypeError,
    NpclipError,
    ProvenanceError,
    StoreError,
)
from npclip.provenance import Provenance
from npclip.store import Reader, Writer
from npclip.store import ids as store_ids
from npclip.store import shards as store_shards
from npclip.store import writer as store_writer
from npclip.store.ids import HASH, Ids, escape, hashes, unescape

D = 4
MADE_BY = Provenance("ViT-B/32", "ab" * 32, "float32", "224 px", True, D, "0.1.0")
FORMATS = ("parquet", "npy")
ODD = [
    "a\udc80\udcff",
    "C:\\udc80",
    "\\u005c",
    "\\",
    "\ud83d\ude00",
    "\u2028\n\r\t\0",
    "",
    "é 😀",
    '"',
]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """It is against power losses only, and slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


def write(folder, format="parquet", **options):
    return Writer(folder, MADE_BY, "image", format=format, **options)


def vectors(ids):
    """What an id's embedding is: its hash."""
    numbers = np.frombuffer(hashes([escape(id) for id in ids]).tobytes(), np.uint8)
    return numbers.reshape(-1, 16)[:, :D].astype(np.float32)


def append(writer, ids):
    writer.append(ids, [f"/pictures/{id}" for id in ids], vectors(ids))


def content(folder):
    """{id: (path, embedding)}; fails where an id is there twice."""
    reader = Reader(folder)
    names = reader.rows(range(len(reader)))
    blocks = [block for _, block in reader.blocks(3)]
    rows = np.concatenate([np.empty((0, D)), *blocks]).tolist()
    assert len({id for id, _ in names}) == len(names) == len(rows)
    return {id: (path, row) for (id, path), row in zip(names, rows, strict=True)}


def expected(ids):
    return {
        id: (f"/pictures/{id}", row) for id, row in zip(ids, vectors(ids).tolist(), strict=True)
    }


def names(prefix, count):
    return [f"{prefix}{i}" for i in range(count)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path, format, dtype):
    ids = names("i", 50)
    rows = np.random.default_rng(0).standard_normal((50, D)).astype(np.float32)
    with write(tmp_path / "c", format, dtype=dtype, shard_rows=20) as writer:
        writer.append(ids, names("/p", 50), rows)
        assert len(writer) == 50
        assert "i49" in writer and "i50" not in writer and 7 not in writer
    with Reader(tmp_path / "c") as reader:
        about = reader.provenance, reader.kind, reader.dtype, reader.dimension, len(reader)
        assert about == (MADE_BY, "image", dtype, D, 50)
        blocks = list(reader.blocks(8))
        assert [first for first, _ in blocks] == np.cumsum(
            [0] + [len(b) for _, b in blocks[:-1]]
        ).tolist()
        assert all(block.dtype == dtype and 1 <= len(block) <= 8 for _, block in blocks)
        np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), rows.astype(dtype))
        assert reader.rows([49, 0, 20, 19, 20]) == [(ids[i], f"/p{i}") for i in (49, 0, 20, 19, 20)]
        assert reader.rows([]) == []
        for wrong in ([50], [-1]):
            with pytest.raises(InputError, match="within 0 and 49"):
                reader.rows(wrong)
        with pytest.raises(InputError, match="max_rows"):
            next(reader.blocks(0))
    assert [len(np.concatenate([b for _, b in Reader(tmp_path / "c").blocks()]))] == [50]


def test_parquet_is_read_without_npclip(tmp_path):
    with write(tmp_path) as writer:
        append(writer, ODD)
    path = tmp_path / "part-00000.parquet"
    table = pq.read_table(path)
    assert table.column_names == ["id", "path", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float16(), nullable=False), D
    )
    assert table["embedding"].to_pylist() == vectors(ODD).tolist()
    assert [unescape(id) for id in table["id"].to_pylist()] == ODD
    about = json.loads(table.schema.metadata[b"npclip"])
    assert Provenance.from_dict(about["provenance"]) == MADE_BY
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    assert (column.compression, column.has_dictionary_page) == ("UNCOMPRESSED", False)


def test_npy_is_read_without_npclip(tmp_path):
    with write(tmp_path, "npy") as writer:
        append(writer, ODD)
    np.testing.assert_array_equal(np.load(tmp_path / "part-00000.npy"), vectors(ODD))
    with open(tmp_path / "part-00000.ids.jsonl", encoding="utf-8") as lines:
        assert [unescape(json.loads(line)["id"]) for line in lines] == ODD
    assert json.loads((tmp_path / "collection.json").read_text()) == {
        "version": 1,
        "provenance": MADE_BY.as_dict(),
        "kind": "image",
        "dtype": "float16",
        "format": "npy",
    }


@given(st.text(st.characters() | st.sampled_from("\\u05cd8\udc80\ud83d")))
def test_escaping_is_reversible(name):
    written = escape(name)
    written.encode()
    assert unescape(written) == name
    if "\\u" not in name and not any("\ud800" <= c <= "\udfff" for c in name):
        assert written == name


@pytest.mark.parametrize(
    "name", ["plain.jpg", "C:\\users\\udine\\d.jpg", "日本.png", "\\u00e9", "\\uDC80"]
)
def test_ordinary_names_are_written_as_they_are(name):
    assert escape(name) == name


@pytest.mark.parametrize("name", ODD)
def test_odd_names(tmp_path, format, name):
    with write(tmp_path, format) as writer:
        append(writer, [name])
    with write(tmp_path, format) as writer:
        assert name in writer
    assert content(tmp_path) == expected([name])


# Crashes


KILLED = """
import os, random, signal, sys, time
import numpy as np
import npclip.store, pyarrow.parquet
from npclip.provenance import Provenance

folder, format, made_by = sys.argv[1], sys.argv[2], Provenance(*eval(sys.argv[3]))

os.fsync = lambda _: None  # against power losses only

def work(rng, done):
    with npclip.store.Writer(folder, made_by, "image", format=format, shard_rows=40) as writer:
        for i in range(1000, 3000, 100):
            writer.fail(f"i{i}", "path", "not yet")
        while left := [i for i in range(3000) if f"i{i}" not in writer]:
            some = left[: rng.randint(1, 30)]
            rows = np.float32([[i, i % 7, i % 11, -i] for i in some])
            writer.append([f"i{i}" for i in some], [f"/{i}" for i in some], rows)
            os.write(done, f"i{some[-1]}\\n".encode())

for _ in range(10):
    rng = random.Random()
    promised, done = os.pipe()
    child = os.fork()
    if not child:
        work(rng, done)
        os._exit(0)
    os.close(done)
    with open(promised) as lines:
        for _ in range(rng.randint(0, 10)):
            print(lines.readline())
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        print(lines.read())
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, no SIGKILL")
def test_killed_at_random_moments(tmp_path, format):
    made_by = repr(tuple(MADE_BY.as_dict().values()))
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "c"), format, made_by]
    promised = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    with write(tmp_path / "c", format, shard_rows=40) as writer:
        assert len(writer) >= len(promised) > 0
        assert all(id in writer for id in promised)
        left = [i for i in range(3000) if f"i{i}" not in writer]
        writer.append([f"i{i}" for i in left], [f"/{i}" for i in left], numbered(left))
    every = {f"i{i}": (f"/{i}", row) for i, row in enumerate(numbered(range(3000)).tolist())}
    assert content(tmp_path / "c") == every
    assert listed(tmp_path / "c") == []
    assert not list((tmp_path / "c").glob(".*.part"))


def numbered(rows):
    return np.array([[i, i % 7, i % 11, -i] for i in rows], np.float16).reshape(-1, D)


def abandon(writer):
    """As a killed process leaves it."""
    writer._journal.close()
    writer._lock.release()


batches = st.lists(st.sampled_from(names("i", 80)), max_size=25)
events = st.sampled_from(["go on", "close", "kill", "tear", "flip"])
steps = st.lists(st.tuples(batches, events, st.integers(0)), max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps, st.sampled_from(FORMATS), st.integers(1, 9))
def test_against_a_dict(tmp_path_factory, steps, format, shard_rows):
    folder = tmp_path_factory.mktemp("c")
    writer, model = write(folder, format, shard_rows=shard_rows), {}
    for ids, event, where in steps:
        if len(set(ids)) < len(ids) or any(id in model for id in ids):
            with pytest.raises(InputError):
                append(writer, ids)
            ids = [id for id in dict.fromkeys(ids) if id not in model]
        append(writer, ids)
        model |= expected(ids)
        if event != "go on":
            writer.close() if event == "close" else abandon(writer)
            torn = event in ("tear", "flip") and damage(folder, event, where)
            writer = write(folder, format, shard_rows=shard_rows)
            if torn:
                assert len(model) - shard_rows <= len(writer) < len(model)
                model = {id: row for id, row in model.items() if id in writer}
        assert len(writer) == len(model)
        assert all(id in writer for id in model)
    writer.close()
    assert content(folder) == model


def damage(folder, how, where):
    """Whether there was something to damage."""
    (path,) = folder.glob("*.journal")
    journal = bytearray(path.read_bytes())
    if not journal:
        return False
    if how == "flip":
        journal[where % len(journal)] ^= 1 + where % 255
    else:
        del journal[where % len(journal) :]
    path.write_bytes(journal)
    return True


def test_the_journal_cut_or_changed_at_every_byte(tmp_path):
    writer = write(tmp_path)
    ends = [0]
    for id in ("a", "b", "c"):
        append(writer, [id])
        ends.append(writer._journal.path.stat().st_size)
    abandon(writer)
    path, journal = writer._journal.path, writer._journal.path.read_bytes()
    assert len(journal) == ends[-1]
    for at in range(len(journal) + 1):
        whole = sum(end <= at for end in ends[1:])
        damaged = [(journal[:at], whole), (journal[:at] + bytes(len(journal) - at), None)]
        if at < len(journal):
            flipped = journal[:at] + bytes([journal[at] ^ 0x41]) + journal[at + 1 :]
            damaged += [(flipped, whole)]
        for found, rows in damaged:
            path.write_bytes(found)
            pending = Reader(tmp_path).pending
            writer = write(tmp_path)
            assert len(writer) == pending >= whole
            assert rows is None or len(writer) == rows
            assert [id in writer for id in "abc"] == [i < len(writer) for i in range(3)]
            assert path.stat().st_size == ends[len(writer)]  # the torn tail is gone
            abandon(writer)


def test_a_crash_between_a_shard_and_its_journal(tmp_path, format, monkeypatch):
    writer = write(tmp_path, format)
    append(writer, ["a", "b"])
    monkeypatch.setattr(store_writer.Journal, "remove", crash)
    with pytest.raises(Crash):
        writer.close()
    monkeypatch.undo()
    assert sorted(path.suffix for path in tmp_path.glob("part-*"))[0] == ".journal"
    assert content(tmp_path) == expected(["a", "b"]) and Reader(tmp_path).pending == 0
    with write(tmp_path, format) as writer:
        assert len(writer) == 2
        append(writer, ["c"])
    assert content(tmp_path) == expected(["a", "b", "c"])
    assert not list(tmp_path.glob("*.journal"))


def test_a_crash_before_a_shard_is_named(tmp_path, format, monkeypatch):
    writer = write(tmp_path, format)
    append(writer, ["a", "b"])
    replaced = []

    def crash_late(part, path):
        if Path(path).suffix in (".npy", ".parquet"):
            raise Crash
        replaced.append(path)
        os.rename(part, path)

    monkeypatch.setattr("npclip.whole_file.os.replace", crash_late)
    with pytest.raises(Crash):
        writer.close()
    monkeypatch.undo()
    assert len(replaced) == (format == "npy")  # the ids come first
    assert len(Reader(tmp_path)) == 0 and Reader(tmp_path).pending == 2
    (tmp_path / ".part-00000.parquet.0123.part").write_text("of a writer that was killed")
    with write(tmp_path, format) as writer:
        assert len(writer) == 2
        append(writer, ["c"])
    assert content(tmp_path) == expected(["a", "b", "c"])
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files")
def test_the_order_of_what_survives_a_power_loss(tmp_path, format, monkeypatch):
    calls = []

    def fsync(handle, real=os.fsync):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        real(handle)

    def replace(part, path, real=os.replace):
        calls.append(("replace", path))
        real(part, path)

    def remove(journal, real=store_writer.Journal.remove):
        calls.append(("remove", journal.path))
        real(journal)

    with write(tmp_path, format, shard_rows=3) as writer:
        append(writer, names("a", 2))
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(store_writer.Journal, "remove", remove)
        append(writer, ["b"])
        journal = tmp_path / "part-00000.journal"
        assert calls == [("fsync", journal)]
        writer._finish_shard()
    shard = calls[1 : calls.index(("remove", journal)) + 1]
    files = ["part-00000.ids.jsonl"] * (format == "npy") + [f"part-00000.{format}"]
    assert len(shard) == 3 * len(files) + 1
    for i, file in enumerate(files):
        synced, replaced, folder = shard[3 * i : 3 * i + 3]
        assert synced[0] == "fsync" and synced[1].name.startswith(f".{file}.")
        assert (replaced, folder) == (("replace", tmp_path / file), ("fsync", tmp_path))


class Crash(BaseException):
    """No Exception, so that nothing handles it."""


def crash(*args):
    raise Crash


# The writer


def test_an_append_is_cut_into_shards(tmp_path, format):
    with write(tmp_path, format, shard_rows=3) as writer:
        append(writer, names("a", 2))
        append(writer, names("b", 9))
    assert [Reader(tmp_path)._shards.rows(i) for i in range(4)] == [3, 3, 3, 2]
    assert list(content(tmp_path)) == names("a", 2) + names("b", 9)


def test_fewer_rows_a_shard_than_a_journal_has(tmp_path):
    writer = write(tmp_path)
    append(writer, names("a", 9))
    abandon(writer)
    with write(tmp_path, shard_rows=2) as writer:
        append(writer, names("b", 3))
    assert len(content(tmp_path)) == 12


def test_what_it_refuses_leaves_it_as_it_was(tmp_path, format):
    with write(tmp_path, format) as writer:
        append(writer, ["a"])
        good = np.zeros((2, D), np.float32)
        for ids, paths, rows, error in [
            (["b", "a"], ["", ""], good, "'a' is in .* already"),
            (["b", "b"], ["", ""], good, "'b' is given twice"),
            (["b", "c"], [""], good, "2 ids, but 1 paths"),
            (["b", "c"], ["", ""], good[:1], r"floating-point \[2, 4\], not float32 \[1, 4\]"),
            (["b", "c"], ["", ""], good[:, :3], r"\[2, 3\]"),
            (["b", "c"], ["", ""], good[0], r"\[4\]"),
            (["b", "c"], ["", ""], good.astype(int), "int64"),
            (["b", "c"], ["", ""], good + np.nan, "finite"),
            (["b", "c"], ["", ""], good + np.inf, "finite"),
            (["b", "c"], ["", ""], good + 65520, "finite in float16"),
        ]:
            with pytest.raises(InputError, match=error):
                writer.append(ids, paths, rows)
        for ids, paths in [("bc", ["", ""]), ([b"b", "c"], ["", ""]), (["b", "c"], [None, ""])]:
            with pytest.raises(InputTypeError, match="sequence of str"):
                writer.append(ids, paths, good)
        assert "b" not in writer and len(writer) == 1
        writer.append([], [], np.empty((0, D)))
        append(writer, ["b"])
    assert content(tmp_path) == expected(["a", "b"])


@pytest.mark.parametrize("rows", [np.float64, np.float16, ">f4"])
def test_any_floating_point_numbers(tmp_path, rows):
    with write(tmp_path) as writer:
        writer.append(["a"], ["/pictures/a"], vectors(["a"]).astype(rows))
        writer.append(
            ["b"], ["/pictures/b"], np.asfortranarray(np.repeat(vectors(["b"]), 2, 1))[:, ::2]
        )
    assert content(tmp_path) == expected(["a", "b"])


def test_what_a_collection_is_does_not_change(tmp_path, format):
    write(tmp_path, format).close()
    other = {"parquet": "npy", "npy": "parquet"}[format]
    for error, made_by, kind, dtype, as_format in [
        (ProvenanceError, replace(MADE_BY, weights_sha256="cd" * 32), "image", "float16", format),
        (ProvenanceError, replace(MADE_BY, dimension=5), "image", "float16", format),
        (InputError, MADE_BY, "text", "float16", format),
        (InputError, MADE_BY, "image", "float32", format),
        (InputError, MADE_BY, "image", "float16", other),
    ]:
        with pytest.raises(error):
            Writer(tmp_path, made_by, kind, dtype=dtype, format=as_format)
    write(tmp_path, format).close()  # the lock was let go
    Writer(tmp_path, replace(MADE_BY, npclip="9"), "image", format=format).close()


@pytest.mark.parametrize(
    "options", [{"kind": "video"}, {"dtype": "bfloat16"}, {"format": "csv"}, {"shard_rows": 0}]
)
def test_wrong_options(tmp_path, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} must be"):
        Writer(tmp_path / "c", MADE_BY, **({"kind": "image"} | options))
    assert not (tmp_path / "c").exists()


def test_one_writer(tmp_path):
    with write(tmp_path):
        with pytest.raises(StoreError, match="another process is writing to it"):
            write(tmp_path)
        made_by = f"npclip.provenance.Provenance(**{MADE_BY.as_dict()})"
        code = f"import npclip.store; npclip.store.Writer({str(tmp_path)!r}, {made_by}, 'image')"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is writing to it" in found.stderr
        assert len(Reader(tmp_path)) == 0  # a Reader takes no lock
    write(tmp_path).close()


def test_closed_by_another_thread(tmp_path):
    writer = write(tmp_path)
    thread = threading.Thread(target=writer.close)
    thread.start()
    thread.join()
    writer.close()
    with pytest.raises(StoreError, match="it is closed"):
        append(writer, ["a"])
    write(tmp_path).close()


def test_many_small_appends_make_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(store_shards, "GROUP", 4)
    with write(tmp_path) as writer:
        for id in names("a", 10):
            append(writer, [id])
    metadata = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 2]
    assert content(tmp_path) == expected(names("a", 10))


def test_a_reader_beside_a_writer(tmp_path, format):
    with write(tmp_path, format, shard_rows=2) as writer:
        append(writer, names("a", 5))
        reader = Reader(tmp_path)
        assert (len(reader), reader.pending) == (4, 1)
        assert content(tmp_path) == expected(names("a", 4))
    assert len(reader) == 4 and len(Reader(tmp_path)) == 5 and Reader(tmp_path).pending == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_a_full_disk_loses_nothing(tmp_path, format, monkeypatch, number, what):
    writer = write(tmp_path, format, shard_rows=4)
    append(writer, names("a", 3))

    def fail(*args):
        raise OSError(number, os.strerror(number))

    if what == "write":

        class Full:
            def __init__(self, stream):
                self.close, self.fileno, self.stream = stream.close, stream.fileno, stream

            def write(self, data):
                if len(data) < 30:
                    fail()
                return self.stream.write(data[: len(data) // 2])

        writer._journal._stream = Full(writer._journal._stream)
    else:
        monkeypatch.setattr(os, what, fail)
    with pytest.raises(StoreError, match=os.strerror(number)):
        append(writer, names("b", 2))
    monkeypatch.undo()
    with pytest.raises(StoreError, match="after an error"):
        append(writer, ["c"])
    with pytest.raises(StoreError, match="after an error"):
        writer.fail("c", "c", "c")
    writer.close()
    assert not list(tmp_path.glob(".*.part"))
    with write(tmp_path, format) as writer:
        assert all(id in writer for id in names("a", 3))
        append(writer, [id for id in names("b", 2) if id not in writer])
    assert content(tmp_path) == expected(names("a", 3) + names("b", 2))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do all")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        write(tmp_path / "c")


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "c").write_text("")
    for make in (write, Reader):
        with pytest.raises(StoreError, match="c"):
            make(tmp_path / "c")


def test_without_pyarrow(tmp_path, monkeypatch):
    write(tmp_path / "old").close()
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for make in (lambda: write(tmp_path / "c"), lambda: Reader(tmp_path / "old")):
        with pytest.raises(BackendError, match=r'pip install "npclip\[parquet\]"'):
            make()
    assert not (tmp_path / "c").exists()
    write(tmp_path / "c", "npy").close()


# errors.jsonl


def listed(folder):
    with open(folder / "errors.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_failures_are_listed_once(tmp_path):
    with write(tmp_path) as writer:
        append(writer, ["good"])
        for id in ("a", "b", "a", "good", "\udc80"):
            writer.fail(id, f"/{id}", "broken\nfile")
        assert writer.failed == 3
        assert len(listed(tmp_path)) == 3  # durable at once
    with write(tmp_path) as writer:
        assert writer.failed == 3
        writer.fail("b", "/b", "again")
        append(writer, ["a", "c"])
        assert writer.failed == 2
        assert len(listed(tmp_path)) == 3
    assert listed(tmp_path) == [
        {"id": "b", "path": "/b", "reason": "broken\nfile"},
        {"id": "\\udc80", "path": "/\\udc80", "reason": "broken\nfile"},
    ]


def test_a_failure_embedded_before_a_crash(tmp_path):
    writer = write(tmp_path)
    writer.fail("a", "/a", "?")
    append(writer, ["a"])
    abandon(writer)
    with write(tmp_path) as writer:
        assert writer.failed == 0
        writer.fail("a", "/a", "?")
        assert writer.failed == 0
    assert listed(tmp_path) == []


def test_a_torn_line_of_failures(tmp_path):
    with write(tmp_path) as writer:
        writer.fail("a", "/a", "?")
        writer.fail("b", "/b", "?")
    path = tmp_path / "errors.jsonl"
    lines = path.read_bytes()
    end = lines.index(b"\n") + 1
    torn = [lines[:at] for at in range(end, len(lines))]
    for some in [*torn, lines[:end] + b"\0" * 20, lines[:end] + b"\0\0\n", lines[:end] + b"7\n"]:
        path.write_bytes(some)
        with write(tmp_path) as writer:
            assert writer.failed == 1
            writer.fail("b", "/b", "?")
        assert path.read_bytes() == lines
    path.write_bytes(b"garbage\n" + lines)
    with pytest.raises(StoreError, match=r"errors\.jsonl, line 1"):
        write(tmp_path)


# Broken files


@pytest.mark.parametrize("damage", [
    "", "{", "[]", "null", "\udc80", '{"version": 1}', ("version", 2), ("kind", "video"),
    ("dtype", "int8"), ("format", 7), ("provenance", {}), ("provenance", None),
    ("provenance", MADE_BY.as_dict() | {"dimension": 0}),
])  # fmt: skip
def test_a_broken_collection(tmp_path, damage):
    with write(tmp_path) as writer:
        append(writer, ["a"])
    path = tmp_path / "collection.json"
    if isinstance(damage, tuple):
        damage = json.dumps(json.loads(path.read_text()) | dict([damage]))
    path.write_bytes(damage.encode(errors="surrogateescape"))
    for make in (write, Reader):
        with pytest.raises(StoreError, match=r"collection\.json"):
            make(tmp_path)


def test_no_collection(tmp_path, format):
    for folder in (tmp_path, tmp_path / "no"):
        with pytest.raises(StoreError, match=r"not a collection.*no collection\.json"):
            Reader(folder)
    with write(tmp_path, format) as writer:
        append(writer, ["a"])
    (tmp_path / "collection.json").unlink()
    with pytest.raises(StoreError, match=r"has a part-.* but no collection\.json"):
        write(tmp_path, format)


def test_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".download.part").write_text("mine, too")
    write(tmp_path).close()
    assert {"notes.txt", ".download.part", "collection.json"} <= set(os.listdir(tmp_path))


def test_a_missing_shard(tmp_path, format):
    with write(tmp_path, format, shard_rows=2) as writer:
        append(writer, names("a", 6))
    (tmp_path / f"part-00001.{format}").unlink()
    for make in (lambda: write(tmp_path, format), lambda: Reader(tmp_path)):
        with pytest.raises(StoreError, match=f"part-00001.{format} is missing"):
            make()


def test_missing_last_shards(tmp_path, format):
    writer = write(tmp_path, format, shard_rows=2)
    append(writer, names("a", 5))
    abandon(writer)
    (tmp_path / f"part-00001.{format}").unlink()
    with pytest.raises(StoreError, match=f"part-00001.{format} is missing"):
        write(tmp_path, format)
    (tmp_path / "part-00001.other").write_text("")
    (tmp_path / {"npy": "part-00001.parquet", "parquet": "part-00001.npy"}[format]).write_text("")
    with pytest.raises(StoreError, match=f"is not {format}"):
        Reader(tmp_path)


def read_all(folder):
    reader = Reader(folder)
    for _ in reader.blocks(5):
        pass
    reader.rows(range(len(reader)))


def broken_shards():
    rows = pa.array([[0.0] * D] * 4, pa.list_(pa.float32(), D))
    other = pa.table({"id": list("abcd"), "path": list("abcd"), "embedding": rows})
    yield "parquet", "part-00000.parquet", lambda path: pq.write_table(other, path)
    for ending in ("parquet", "npy"):
        name = f"part-00000.{ending}"
        yield ending, name, lambda path: path.write_bytes(b"")
        yield ending, name, lambda path: path.write_bytes(b"garbage" * 99)
        yield ending, name, lambda path: path.write_bytes(path.read_bytes()[:-1])
        yield ending, name, lambda path: path.write_bytes(path.read_bytes()[1:])
        yield ending, name, lambda path: (path.unlink(), path.mkdir())
    for array in (np.zeros((4, D)), np.zeros((4, 3), "f2"), np.zeros(4, "f2"), np.array([{}])):
        yield "npy", "part-00000.npy", lambda path, array=array: np.save(path, array)
    zipped = io.BytesIO()
    np.savez(zipped, np.zeros(4))
    yield "npy", "part-00000.npy", lambda path: path.write_bytes(zipped.getvalue())
    name = "part-00000.ids.jsonl"
    for lines in (b"", b'{"id": "a", "path": "a"}\n' * 3, b'{"id": "a", "path": "a"}\n' * 5,
                  b'{"id": "a", "path": 7}\n' * 4, b'{"id": 7, "path": "a"}\n' * 4, b"{}\n" * 4,
                  b'{"id": "\\udc80", "path": "a"}\n' * 4,
                  b"\xff\n" * 4, b"[]\n" * 4):  # fmt: skip
        yield "npy", name, lambda path, lines=lines: path.write_bytes(lines)
    yield "npy", name, lambda path: path.unlink()


@pytest.mark.parametrize("number", range(sum(1 for _ in broken_shards())))
def test_a_broken_shard(tmp_path, number):
    format, name, damage = list(broken_shards())[number]
    with write(tmp_path, format) as writer:
        append(writer, names("a", 4))
    read_all(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        read_all(tmp_path)
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        write(tmp_path, format)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0), st.integers(1, 255))
def test_a_changed_byte_of_parquet_is_seen_or_harmless(tmp_path, where, by):
    path = tmp_path / "c" / "part-00000.parquet"
    if not path.exists():
        with write(tmp_path / "c") as writer:
            append(writer, names("a", 9))
    good = path.read_bytes()
    bad = bytearray(good)
    bad[where % len(bad)] ^= by
    path.write_bytes(bad)
    try:
        assert content(tmp_path / "c") == expected(names("a", 9))
    except NpclipError:
        pass
    finally:
        path.write_bytes(good)


def test_a_shard_of_another_model(tmp_path):
    for name, made_by in [("one", MADE_BY), ("two", replace(MADE_BY, normalized=False))]:
        with Writer(tmp_path / name, made_by, "image") as writer:
            append(writer, [name])
    shard = "part-00000.parquet"
    (tmp_path / "two" / shard).replace(tmp_path / "one" / "part-00001.parquet")
    for make in (write, Reader):
        with pytest.raises(ProvenanceError, match=r"part-00001\.parquet .*normalisation"):
            make(tmp_path / "one")


# Sets of ids


def test_ids_in_little_memory():
    count = 200_000
    every, ids = hashes(f"i{i}" for i in range(count + 1)), Ids()
    tracemalloc.start()
    for first in range(0, count, 1000):
        ids.add(every[first : min(first + 1000, count)])
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == count
    assert used < 16 * count + 100 * store_ids.MERGE_AT
    assert peak < 3 * 16 * count + 200 * store_ids.MERGE_AT
    assert ids.find(every).tolist() == [True] * count + [False]


@settings(max_examples=100)
@given(
    st.lists(
        st.lists(
            st.binary(min_size=16, max_size=16)
            | st.builds(lambda b: b.ljust(16, b"\0"), st.binary(max_size=3))
        )
    ),
    st.booleans(),
)
def test_ids_against_a_set(batches, opened):
    model, few = set(), 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_ids, "MERGE_AT", few)
        ids = Ids()
        for batch in batches:
            wanted = np.frombuffer(b"".join(batch), HASH)
            assert ids.find(wanted).tolist() == [hash in model for hash in batch]
            assert [hash in ids for hash in batch] == [hash in model for hash in batch]
            new = [hash for hash in dict.fromkeys(batch) if hash not in model]
            array = np.frombuffer(b"".join(new), HASH)
            if opened and not model:
                ids = Ids(array.copy())
            else:
                ids.add(array)
            model |= set(new)
            assert len(ids) == len(model)
        sizes = [len(known) for known in ids._sorted]
        assert all(a >= 2 * b for a, b in zip(sizes, sizes[1:], strict=False)) or opened


def test_blocks_of_parquet_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(store_shards, "GROUP", 100)
    with write(tmp_path) as writer:
        append(writer, names("i", 1000))
    file = pq.ParquetFile(tmp_path / "part-00000.parquet")
    assert file.metadata.num_row_groups == 10
    assert len(list(Reader(tmp_path).blocks(100))) == 10
    assert Reader(tmp_path).rows([999, 5]) == [("i999", "/pictures/i999"), ("i5", "/pictures/i5")]
