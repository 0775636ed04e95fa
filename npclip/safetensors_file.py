""".safetensors files: 8 bytes of header length, a JSON header, and the tensors' bytes.

Read: the safetensors library validates the file; the views below are then zero-copy, bfloat16
included. Written: without the library, which wants all tensors in memory, C order, and gives the
keys of the metadata another order in every process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import BinaryIO

import numpy as np

from .errors import CheckpointError
from .tensor import DTYPES, MappedFile, Tensor

NAMES = {  # the format's name of a dtype -> ours
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FORMAT_NAMES = {ours: theirs for theirs, ours in NAMES.items()}


def read_safetensors(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, and the metadata of the header.

    Raises CheckpointError for a file that the safetensors library rejects, and for other dtypes.
    """
    from safetensors import SafetensorError, safe_open  # here, so that import npclip stays light

    try:
        with safe_open(file.path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not a valid safetensors file: {error}") from error
    start = 8 + int.from_bytes(file.map[:8], "little")
    header = json.loads(file.map[8:start])
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        if (dtype := NAMES.get(entry["dtype"])) is None:
            raise CheckpointError(f"tensor {name} has dtype {entry['dtype']}, which is not read")
        shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
        tensors[name] = Tensor(shape, dtype, partial(file.view, dtype, shape, offset))
    return tensors, metadata


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """What read_safetensors returns; each tensor is read once, and not kept. The same tensors and
    metadata give the same bytes. Raises OSError, and what a tensor's read() raises."""
    # Wide dtypes first, as the library orders them: every tensor is then aligned to its item size.
    names = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        begin = end
        end += int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {
            "dtype": FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        array = np.ascontiguousarray(tensors[name].read())
        file.write(array.reshape(-1).view(np.uint8).data)
