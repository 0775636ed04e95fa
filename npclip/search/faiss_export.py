"""A collection as a FAISS index: approximate search, for those who have more rows than patience.

    export(reader, "photos.faiss")
    index = faiss.read_index("photos.faiss")
    scores, rows = index.search(queries, 10)  # [Q, D] of length 1 -> cosines, row numbers [Q, 10]

photos.faiss.jsonl has {"id", "path"} of each row, a line each; photos.faiss.json says what the
embeddings were made by, as a collection does.
"""

from __future__ import annotations

import json
import os
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clip import Float32
from ..errors import BackendError, InputError
from ..store import Reader
from ..whole_file import replacing

ROWS_AT_A_TIME = 65536
HNSW_ROWS = 200_000  # up to here a graph, which takes a core a minute for 50,000 rows
LINKS, EF_CONSTRUCTION, EF_SEARCH = 32, 80, 128
TRAINING_ROWS = 40  # for each cell of an inverted file: what FAISS asks for at least
PROBED = 16  # a query looks into one cell of so many


def export(reader: Reader, path: str | os.PathLike[str], *, hnsw_rows: int = HNSW_ROWS) -> str:
    """Write the index and the two files beside it; returns its kind, as FAISS names it.

    All rows, of length 1 and in float16, are in memory meanwhile. Up to hnsw_rows rows the index is
    a graph (HNSW), beyond an inverted file (IVF).

    Raises BackendError where there is no faiss, InputError for a collection without rows,
    StoreError where it is broken, OSError where a file cannot be written.
    """
    faiss = _faiss()
    if not len(reader):
        raise InputError(f"{reader.folder} has no embeddings")
    path = Path(path)
    index, kind = _built(faiss, reader, hnsw_rows)
    _write_names(reader, path.with_name(f"{path.name}.jsonl"))
    about = {
        "provenance": reader.provenance.as_dict(),
        "kind": reader.kind,
        "rows": len(reader),
        "index": kind,
        "metric": "inner product of rows of length 1",
    }
    with replacing(path.with_name(f"{path.name}.json")) as stream:
        stream.write(json.dumps(about, indent=2).encode() + b"\n")
    with replacing(path) as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    return kind


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise BackendError(f'this needs FAISS: pip install "npclip[faiss]" ({error})') from error
    return faiss


def _built(faiss: Any, reader: Reader, hnsw_rows: int) -> tuple[Any, str]:
    kind = f"HNSW{LINKS},SQfp16"
    if len(reader) > hnsw_rows:
        cells = ceil(4 * sqrt(len(reader)))
        kind = f"IVF{cells},SQfp16"
    index = faiss.index_factory(reader.dimension, kind, faiss.METRIC_INNER_PRODUCT)
    if len(reader) > hnsw_rows:
        index.nprobe = ceil(cells / PROBED)
        index.train(_sample(reader, TRAINING_ROWS * cells))
    else:
        index.hnsw.efConstruction, index.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
        index.train(_sample(reader, 1))  # of no effect, but it asks for it
    for _, block in reader.blocks(ROWS_AT_A_TIME):
        index.add(_unit(block))
    return index, kind


def _sample(reader: Reader, count: int) -> Float32:
    """About so many rows, one in every few."""
    step = max(1, len(reader) // count)
    blocks = reader.blocks(ROWS_AT_A_TIME)
    return np.concatenate([_unit(block[-first % step :: step]) for first, block in blocks])


def _unit(rows: NDArray[Any]) -> Float32:
    """In float32, of length 1; rows of zeros stay so."""
    wide = np.asarray(rows, np.float32)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return np.asarray(wide / np.where(lengths > 0, lengths, 1), np.float32)


def _write_names(reader: Reader, path: Path) -> None:
    with replacing(path) as stream:
        for first in range(0, len(reader), ROWS_AT_A_TIME):
            numbers = np.arange(first, min(first + ROWS_AT_A_TIME, len(reader)))
            for id, name in reader.rows(numbers):
                stream.write(json.dumps({"id": id, "path": name}).encode() + b"\n")
