"""Reads .safetensors files: 8 bytes of header length, a JSON header, and the tensors' bytes.

The safetensors library validates the file; the views below are then zero-copy, bfloat16 included.
"""

from __future__ import annotations

import json
from functools import partial

from .errors import CheckpointError
from .tensor import MappedFile, Tensor

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
