"""Writes files as torch.save and torch.jit.save do, without torch: pickles spelled out by hand."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {"f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "u2": "BFloat16"}


@dataclass
class Name:
    """A global: GLOBAL module name."""

    module: str
    name: str


@dataclass
class Call:
    """REDUCE of a global."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass
class Module:
    """A TorchScript object: NEWOBJ, BUILD with its attributes. May contain itself."""

    cls: Name
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Persistent:
    """A persistent id."""

    value: Any


@dataclass
class Built:
    """BUILD of an object with a state."""

    target: Any
    state: Any


@dataclass
class Raw:
    """Opcodes as they are."""

    data: bytes


ORDERED_DICT = Name("collections", "OrderedDict")


class TorchWriter:
    """Collects storages; archive() gives the bytes of the ZIP file."""

    def __init__(self, *, stored_crc: bool = True) -> None:
        self.storages: list[bytes] = []
        self.stored_crc = stored_crc

    def tensor(self, array: np.ndarray, storage: np.ndarray | None = None) -> Call:
        """A tensor; of a view, pass the base as storage (else the array is its own)."""
        if storage is None:
            storage = array = np.ascontiguousarray(array).reshape(array.shape)
        key = str(len(self.storages))
        self.storages.append(storage.tobytes())
        return self.view(
            key,
            storage,
            offset=(array.ctypes.data - storage.ctypes.data) // array.itemsize,
            shape=array.shape,
            strides=tuple(s // array.itemsize for s in array.strides),
        )

    def view(
        self,
        key: str,
        storage: np.ndarray,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> Call:
        cls = Name("torch", STORAGES[storage.dtype.str[1:]] + "Storage")
        persistent = Persistent(("storage", cls, key, "cpu", storage.size))
        return Call(
            Name("torch._utils", "_rebuild_tensor_v2"),
            (persistent, offset, shape, strides, False, Call(ORDERED_DICT, ())),
        )

    def archive(self, root: Any, root_name: str = "model", **extra: bytes) -> bytes:
        """The file. Values of extra are more entries, "__" in their names meaning "/"."""
        entries = {"data.pkl": dump(root), "byteorder": b"little"}
        entries |= {f"data/{i}": data for i, data in enumerate(self.storages)}
        entries |= {"version": b"3\n", ".data/serialization_id": b"1" * 40}
        entries |= {name.replace("__", "/"): data for name, data in extra.items()}
        return zip_bytes({f"{root_name}/{name}": data for name, data in entries.items()})


def state_dict(writer: TorchWriter, arrays: dict[str, np.ndarray]) -> Built:
    """An OrderedDict of tensors with _metadata, as module.state_dict() gives."""
    items = {name: writer.tensor(array) for name, array in arrays.items()}
    state = {"_metadata": Call(ORDERED_DICT, ())}
    return Built(Raw(dump_value(Call(ORDERED_DICT, ())) + _items(items)), state)


def script_module(
    writer: TorchWriter, arrays: dict[str, np.ndarray], activation: str = "QuickGELU"
) -> Module:
    """A TorchScript model whose submodules follow the dots in the names."""
    root = Module(Name("__torch__.clip.model", "CLIP"), {"training": False})
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            child = Module(Name("__torch__.torch.nn.___torch_mangle_3", "Module"))
            node = node.attributes.setdefault(part, child)
            if part == "mlp":
                gelu = Module(Name("__torch__.clip.model.___torch_mangle_7", activation))
                node.attributes.setdefault("gelu", gelu)
        node.attributes[leaf] = writer.tensor(array)
    return root


def zip_bytes(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def without_crc(data: bytes) -> bytes:
    """The archive as set_crc32_options(False) writes it: every recorded CRC-32 is 0."""
    result = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = archive.start_dir
        for info in archive.infolist():
            result[info.header_offset + 14 : info.header_offset + 18] = bytes(4)
            result[at + 16 : at + 20] = bytes(4)
            at += 46 + sum(struct.unpack_from("<HHH", data, at + 28))
    return bytes(result)


def dump(root: Any) -> bytes:
    """The pickle of a value made of plain Python and the classes above."""
    return b"\x80\x02" + dump_value(root) + b"."


def dump_value(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if abs(value) < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(dump_value, value)) + b"t"
        case list():
            return b"](" + b"".join(map(dump_value, value)) + b"e"
        case dict():
            return b"}" + _items(value)
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return dump_value(value.function) + dump_value(value.arguments) + b"R"
        case Module():
            return dump_value(value.cls) + b")\x81" + dump_value(value.attributes) + b"b"
        case Persistent():
            return dump_value(value.value) + b"Q"
        case Built():
            return dump_value(value.target) + dump_value(value.state) + b"b"
        case Raw():
            return value.data
    raise TypeError(f"cannot pickle {value!r}")


def _items(items: dict[Any, Any]) -> bytes:
    return b"(" + b"".join(dump_value(k) + dump_value(v) for k, v in items.items()) + b"u"


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
