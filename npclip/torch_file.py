"""Reads what torch.save and torch.jit.save write, without torch, and without running any of it.

Both write a ZIP archive whose data are stored as they are, not compressed:

    <name>/data.pkl      the objects, as a pickle               -> unpickle.py
    <name>/data/<key>    the bytes of one storage each          -> views of the mapped file
    <name>/byteorder     "little", in newer files
    <name>/code/ ...     the program of a TorchScript archive   -> never read (and compressed)

Python's zipfile parses the directory; an entry that is used is then checked against the file.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError
from .tensor import DTYPES, Array, MappedFile, Tensor
from .unpickle import Module, StoredTensor, unpickle

MAX_PICKLE = 4 << 20  # bytes; a tensor takes about 150, and hostile bytes 64 times as much memory
MAX_RANK = 8  # dimensions; a convolution has 4
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts keep the tensors
ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}  # class name -> ours
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's files began before 1.6
SPAN = 1 << 24  # bytes whose CRC is taken at a time


@dataclass(frozen=True)
class TorchFile:
    """The tensors of the file by name; kind is "TorchScript" or "state_dict".

    activation is what a TorchScript archive's class names tell, else None.
    """

    tensors: dict[str, Tensor]
    kind: str
    activation: str | None


def read_torch(file: MappedFile) -> TorchFile:
    """Read the archive's directory and pickle; storages are read, and their CRC checked, later.

    Raises CheckpointError for anything but a sound archive with a state_dict or TorchScript model.
    """
    archive = _Archive(file)
    root = unpickle(archive.read("data.pkl", MAX_PICKLE))
    activation = None
    if isinstance(root, Module):
        kind = "TorchScript"
        stored, activation = _walk_modules(root)
    elif isinstance(root, dict):
        kind = "state_dict"
        stored = _find_state_dict(root)
    else:
        raise CheckpointError(f"it holds a {type(root).__name__}, not a state_dict")
    return TorchFile({k: archive.tensor(k, v) for k, v in stored.items()}, kind, activation)


def _find_state_dict(root: dict[Any, Any]) -> dict[str, StoredTensor]:
    """The str -> tensor entries of root, or of the dict in it that training scripts make."""
    for wrapper in WRAPPERS:
        if isinstance(root.get(wrapper), dict):
            root = root[wrapper]
            break
    tensors = {k: v for k, v in root.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
    if not tensors:
        keys = ", ".join(str(key)[:50] for key in list(root)[:5]) or "nothing"
        raise CheckpointError(f"it holds no tensors by name (but {keys})")
    return tensors


def _walk_modules(root: Module) -> tuple[dict[str, StoredTensor], str | None]:
    """A TorchScript model's parameters and buffers under their dotted names, and its activation.

    A module that occurs twice counts once, so cycles end.
    """
    tensors: dict[str, StoredTensor] = {}
    activations: set[str] = set()
    seen, queue = {id(root)}, [("", root)]
    while queue:
        prefix, module = queue.pop()
        if found := ACTIVATIONS.get(module.cls.rpartition(".")[2]):
            activations.add(found)
        for name, value in module.attributes.items():
            if isinstance(value, StoredTensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Module) and id(value) not in seen:
                seen.add(id(value))
                queue.append((f"{prefix}{name}.", value))
    if len(activations) > 1:
        raise CheckpointError("it has both QuickGELU and GELU modules")
    return tensors, activations.pop() if activations else None


class _Archive:
    """The ZIP file: where the bytes of each entry lie."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        try:
            with zipfile.ZipFile(file.path) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except Exception as error:  # zipfile raises half a dozen types for damaged directories
            raise CheckpointError(f"damaged or truncated ZIP archive: {error}") from error
        infos.sort(key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos[1:]] + [end]  # one, too, where infos is empty
        self.infos = {i.filename: (i, e) for i, e in zip(infos, ends, strict=False)}
        if len(self.infos) != len(infos):
            raise CheckpointError("two entries of the ZIP archive have the same name")
        # torch.serialization.set_crc32_options(False) writes 0 for every entry.
        self.has_crc = any(info.CRC for info in infos)
        self.checked: set[str] = set()
        roots = [name.removesuffix("data.pkl") for name in self.infos if _is_root(name)]
        if len(roots) != 1:
            raise CheckpointError(
                "a ZIP archive, but not one of torch.save or torch.jit.save: it has "
                f"{len(roots) or 'no'} <name>/data.pkl"
            )
        self.root = roots[0]
        if self.root + "byteorder" in self.infos:
            order = self.read("byteorder", 16)
            if order != b"little":
                raise CheckpointError(f"its byte order is {order!r}: only little-endian is read")

    def locate(self, name: str) -> tuple[int, int, int]:
        """(offset, size, CRC) of an entry, which must end before the next one begins.

        Raises CheckpointError where the entry is missing, or is not what torch writes.
        """
        if name not in self.infos:
            raise CheckpointError(f"entry {name!r} is missing")
        info, end = self.infos[name]
        at = info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(f"entry {name!r} is compressed, which torch never does to data")
        # Bit 3: sizes follow the data. Bit 11: the name is UTF-8. Others: encryption, patches.
        if info.flag_bits & ~0x808:
            raise CheckpointError(f"entry {name!r} is encrypted or of an unknown kind")
        if not 0 <= at <= len(self.file) - 30:
            raise CheckpointError(f"entry {name!r} lies outside the file")
        magic, flags, method, crc, packed, size, name_size, extra_size = struct.unpack(
            "<4s2xHH4xIIIHH", self.file.map[at : at + 30]
        )
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        stored_name = self.file.map[at + 30 : at + 30 + name_size]
        agrees = (magic, method, stored_name) == (b"PK\3\4", 0, info.orig_filename.encode(encoding))
        if not flags & 8 and packed != 0xFFFFFFFF:  # else the local header need not say
            agrees &= (crc, packed, size) == (info.CRC, info.file_size, info.file_size)
        start = at + 30 + name_size + extra_size
        if not agrees or start + info.file_size > end:
            raise CheckpointError(f"entry {name!r} contradicts the archive's directory")
        return start, info.file_size, info.CRC

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small entry, its CRC checked."""
        offset, size, _ = self.locate(self.root + name)
        if size > limit:
            raise CheckpointError(f"{name} has {size} bytes, more than the limit of {limit}")
        self.check(self.root + name)
        return self.file.map[offset : offset + size]

    def check(self, entry: str) -> None:
        """Compare the entry's CRC-32 with the archive's record, the first time that it is read."""
        if entry in self.checked or not self.has_crc:
            return
        offset, size, recorded = self.locate(entry)
        crc, end = 0, offset + size
        with memoryview(self.file.map) as memory:
            for start in range(offset, end, SPAN):
                crc = zlib.crc32(memory[start : min(start + SPAN, end)], crc)
        if crc != recorded:
            raise CheckpointError(
                f"{self.file.path}: entry {entry!r} is corrupt (its CRC-32 does not match)"
            )
        self.checked.add(entry)

    def tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """The tensor as a view of its storage, once it is known to lie within it."""
        storage, shape, strides = stored.storage, stored.shape, stored.strides
        entry, itemsize = f"{self.root}data/{storage.key}", DTYPES[storage.dtype].itemsize
        start, size, _ = self.locate(entry)
        if size != storage.size * itemsize:
            raise CheckpointError(
                f"tensor {name}: entry {entry!r} has {size} bytes where its {storage.size} "
                f"elements of {storage.dtype} take {storage.size * itemsize}"
            )
        count, last = 1, stored.offset
        for length, stride in zip(shape, strides, strict=True):
            count *= length
            last += (length - 1) * stride
        # A stride of 0 could make terabytes of one element: no tensor exceeds its storage.
        if len(shape) > MAX_RANK or (count and max(last + 1, count) > storage.size):
            raise CheckpointError(
                f"tensor {name} of shape {list(shape)[:MAX_RANK]} does not fit its storage "
                f"of {storage.size} elements"
            )
        offset = start + stored.offset * itemsize

        def read() -> Array:
            self.check(entry)
            steps = tuple(stride * itemsize for stride in strides)
            return self.file.view(storage.dtype, shape, offset, steps)

        return Tensor(shape, storage.dtype, read)


def _is_root(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")
