"""The fuzz targets: functions of bytes, each with the exceptions that its function documents.

All files are written into one folder of this process, in memory where the system has such a place.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutate as mutate
import fuzz_seeds
import numpy as np

from npclip import errors, sources
from npclip.__main__ import main
from npclip.checkpoint import open_checkpoint
from npclip.clip import load, open_model
from npclip.preprocess import load_image, preprocess
from npclip.sources.items import ERRORS, Item
from npclip.store import Reader, Writer
from npclip.tokenizer import VOCAB_SIZE, decode, encode, tokenize
from npclip.unpickle import unpickle

EXTENSIONS = ("txt", "jsonl", "csv", "tsv")
MAX_PIXELS = 1 << 20
SIDE = 16  # what images are resized to


@functools.cache
def work() -> Path:
    """The folder; it is removed when the process ends. Nothing may be written elsewhere."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    place = os.environ.get("NPCLIP_FUZZ_FOLDER", memory)
    folder = Path(tempfile.mkdtemp(prefix="npclip-fuzz-", dir=place))
    pid = os.getpid()
    atexit.register(lambda: os.getpid() == pid and shutil.rmtree(folder, ignore_errors=True))
    return folder


def _file(name: str, data: bytes) -> Path:
    path = work() / name
    path.write_bytes(data)
    return path


def _folder(files: dict[str, bytes]) -> Path:
    folder = work() / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _is_one_in(number: int, data: bytes) -> bool:
    """Of so many inputs, the same ones each time: for what is slow."""
    return hashlib.blake2b(data, digest_size=4).digest()[0] % number == 0


def _checkpoint(path: Path, data: bytes) -> None:
    opened = open_checkpoint(path)
    for tensor in opened.tensors.values():
        array = tensor.read()
        assert array.shape == tensor.shape
        array.tobytes()  # touches all of it
    checkpoint, _ = open_model(path)
    checkpoint.sha256()
    if _is_one_in(8, data):
        model = load(path, device="cpu")
        model.provenance()
        model.encode_text(np.zeros((1, model.context_length), np.int32))


def safetensors(data: bytes) -> None:
    """A checkpoint file."""
    _checkpoint(_file("model.safetensors", data), data)


def torch(data: bytes) -> None:
    """Of torch.save, torch.jit.save, and what is called so."""
    _checkpoint(_file("model.pt", data), data)


def folder(data: bytes) -> None:
    """A directory of Hugging Face or open_clip, or a sharded one."""
    _checkpoint(_folder(mutate.unpack(data)), data)


def pickle(data: bytes) -> None:
    """The restricted unpickler."""
    unpickle(data)


def tokenizer(data: bytes) -> None:
    """Any text."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    ids = encode(text)
    assert all(0 <= id < VOCAB_SIZE for id in ids)
    assert isinstance(decode(ids), str)
    is_short = len(ids) <= 75
    tokens = tokenize(text, truncate=is_short)
    assert (tokens.dtype, tokens.shape) == (np.int32, (1, 77))
    assert tokens[0, 1 : len(ids) + 1].tolist() == ids


def decoding(data: bytes) -> None:
    """Ids -> text."""
    assert isinstance(decode(np.frombuffer(data[: len(data) // 4 * 4], "<i4").tolist()), str)


def image(data: bytes) -> None:
    """Encoded images: decoded whole, or as --fast-decode does."""
    loaded = load_image(data, MAX_PIXELS, SIDE if _is_one_in(2, data) else None)
    _check_pixels(preprocess(loaded, SIDE))
    if _is_one_in(8, data):
        _check_pixels(preprocess(data, SIDE))


def _check_pixels(pixels: np.ndarray) -> None:
    assert (pixels.dtype, pixels.shape) == (np.float32, (3, SIDE, SIDE))
    assert np.isfinite(pixels).all()


def _items(path: str, kind: Any, suppressed: Any = (), **options: Any) -> None:
    """Every item can be read, or says why not; ids differ; what is an image's path can be read."""
    ids = set()
    for count, item in enumerate(sources.open_sources([path], kind, **options)):
        assert item.id not in ids, f"twice: {item.id!r}"
        ids.add(item.id)
        if (found := _read(item, kind)) is None or count > 20:
            continue
        if kind == "image":
            with contextlib.suppress(*suppressed):
                assert sources.read_path(item.path) == found
        else:
            found.encode()


def _read(item: Item, kind: Any) -> Any:
    try:
        found = item.read()
    except (errors.ImageError, errors.InputError) as error:
        assert isinstance(error, ERRORS[kind]) and str(error)
        return None
    assert isinstance(found, bytes if kind == "image" else str)
    assert found or kind == "text"
    return found


def _pairs(path: str, **options: Any) -> None:
    """Every pair has texts, and its image somewhere, or says why not."""
    for pair in sources.open_pairs([path], **options):
        assert bool(pair.texts) != bool(pair.reason), pair
        assert pair.reason or pair.path
        "".join(pair.texts).encode()


def tar(data: bytes) -> None:
    """Images and texts in tar files."""
    path = str(_file("a.tar", data))
    _each(lambda: _items(path, "image"), lambda: _items(path, "text"), lambda: _pairs(path))


def parquet(data: bytes) -> None:
    """Images and texts in Parquet files."""
    path = str(_file("a.parquet", data))
    _each(
        # the footer may say other numbers of rows than there are
        lambda: _items(path, "image", suppressed=(errors.ImageError,)),
        lambda: _items(path, "text"),
        lambda: _items(path, "text", column="text", id_column="id"),
        lambda: _pairs(path),
    )


def _each(*parts: Callable[[], None]) -> None:
    """All of them; what is documented of one is raised in the end."""
    last = None
    for part in parts:
        try:
            part()
        except errors.InputError as error:
            last = error
    if last is not None:
        raise last


def text_files(data: bytes) -> None:
    """The first byte says which of EXTENSIONS."""
    extension = EXTENSIONS[data[0] % 4 if data else 0]
    path = str(_file(f"a.{extension}", data[1:]))
    _each(
        lambda: _items(path, "text"),
        lambda: _items(path, "text", column="text", id_column="id"),
        lambda: _pairs(path, image_column="id", text_column="text"),
    )


def list_file(data: bytes) -> None:
    """A list of sources, which may name no more than what lies in the folder.

    Each line that is a pattern reads the folder again: 16 KiB of them are enough.
    """
    data = data[: 1 << 14]
    folder = _folder({"a.png": b"x", "b.txt": b"a\nb", "c.txt": b"a.png\n@c.txt\n@list\n"})
    (folder / "list").write_bytes(data.replace(b"/", b"_").replace(b"..", b"_"))
    with _chdir(folder), _stdin():
        _each(lambda: _items("@list", "image"), lambda: _items("@list", "text"))


@contextlib.contextmanager
def _chdir(folder: Path) -> Any:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _stdin() -> Any:
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"a.png\nb.txt\n"))
    try:
        yield
    finally:
        sys.stdin = before


def store(data: bytes) -> None:
    """A collection: read, and gone on with."""
    folder = _folder(mutate.unpack(data))
    _store(folder, _read_collection, _write_collection)


def _store(folder: Path, *parts: Callable[[Path], None]) -> None:
    last: errors.NpclipError | None = None
    for part in parts:
        try:
            part(folder)
        except (errors.StoreError, errors.ProvenanceError, errors.InputError) as error:
            last = error
    if last is not None:
        raise last


def _read_collection(folder: Path) -> None:
    with Reader(folder) as reader:
        for _, block in reader.blocks(3):
            assert block.shape[1:] == (reader.dimension,) and block.dtype == reader.dtype
            block.tobytes()
        names = reader.rows(range(len(reader)))
        assert len(names) == len(reader)
        assert reader.pending >= 0


def _write_collection(folder: Path) -> None:
    format = "npy" if any(folder.glob("*.npy")) else "parquet"
    provenance = fuzz_seeds.PROVENANCE
    with Writer(folder, provenance, "image", format=format, shard_rows=4) as writer:
        before = len(writer)
        new = [id for id in ("a", "new", "\ud800") if id not in writer]
        writer.append(new, new, np.zeros((len(new), 4), np.float32))
        writer.fail("g", "x", "y")
        assert all(id in writer for id in new)
        assert len(writer) == before + len(new)


@functools.cache
def _words() -> bytes:
    return fuzz_seeds.model_bytes(words=True)


def command_line(data: bytes) -> None:
    """npclip with any arguments, NUL between them; no path leads out of the folder."""
    text = data[:4096].decode("utf-8", "surrogateescape").replace("/", "_").replace("..", "_")
    arguments = [_bounded(one) for one in text.split("\0")[:30]]
    place = work() / "command-line"
    shutil.rmtree(place, ignore_errors=True)
    (place / "texts").mkdir(parents=True)
    (place / "a.png").write_bytes(fuzz_seeds.images()[0])
    (place / "list").write_bytes(b"a.png\ntexts\n")
    (place / "texts" / "a.csv").write_bytes(b"id,text\n1,a cat\n")
    (place / "model.safetensors").write_bytes(_words())
    before = os.environ.copy()
    os.environ |= {"NPCLIP_OFFLINE": "1", "NPCLIP_CACHE": str(place), "HOME": str(place)}
    printed = io.StringIO()
    try:
        to = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
        with _chdir(place), _stdin(), to[0], to[1]:
            code = main(arguments)
    except SystemExit as error:
        code = error.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert code in (0, 1, 2, None), code
    assert "Traceback" not in printed.getvalue()
    if code == 1:
        raise errors.NpclipError(printed.getvalue())
    if code == 2:
        raise SystemExit(2)


def _bounded(argument: str) -> str:
    """No more threads, and no larger batches, than this process may have."""
    return argument if not argument.isdigit() else argument[-2:]


@dataclass(frozen=True)
class Target:
    """What is tried, and how."""

    run: Callable[[bytes], None]
    documented: tuple[type[BaseException], ...]
    mutate: mutate.Mutate
    seeds: Callable[[], Iterable[bytes]]
    share: int  # of a long run's inputs, in thousandths


CHECKPOINT = (errors.CheckpointError,)
FILES: dict[str, mutate.Mutate] = {
    ".json": mutate.some_json,
    ".jsonl": mutate.lines,
    ".safetensors": mutate.framed_json,
    ".journal": mutate.journal,
}
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "safetensors": (safetensors, CHECKPOINT, mutate.framed_json, 60),
    "pickle": (pickle, CHECKPOINT, mutate.opcodes, 380),
    "torch": (torch, CHECKPOINT, mutate.zip_entries, 40),
    "folder": (folder, CHECKPOINT, mutate.in_folder(FILES), 12),
    "tokenizer": (tokenizer, (errors.TextTooLongError,), mutate.some_text, 120),
    "decode": (decoding, (errors.InputError,), mutate.some_bytes, 100),
    "image": (image, (errors.ImageError,), mutate.png_chunks, 110),
    "tar": (tar, (errors.InputError,), mutate.tar_headers, 40),
    "parquet": (parquet, (errors.InputError,), mutate.some_bytes, 30),
    "text-files": (text_files, (errors.InputError,), mutate.lines, 85),
    "list": (list_file, (errors.InputError,), mutate.lines, 10),
    "store": (
        store,
        (errors.StoreError, errors.ProvenanceError, errors.InputError),
        mutate.in_folder(FILES),
        8,
    ),
    "command-line": (command_line, (errors.NpclipError, SystemExit), mutate.arguments, 5),
}
TARGETS = {
    name: Target(run, documented, mutation, fuzz_seeds.SEEDS[name], share)
    for name, (run, documented, mutation, share) in FUNCTIONS.items()
}
