"""A collection of embeddings on disk: a folder that is written once, resumed, and read by anything.

::

    with Writer("photos", model.provenance(), "image") as writer:
        writer.append(["a.jpg"], ["/photos/a.jpg"], embeddings)  # [1, D]; now it cannot be lost
    with Reader("photos") as reader:
        for first, block in reader.blocks(65536):  # [n, D]
            ...

The folder holds::

    collection.json        {"version": 1, "provenance": {...}, "kind": "image" or "text",
                           "dtype": "float16" or "float32", "format": "parquet" or "npy"}
    part-00000.parquet     shards, numbered without a gap. Columns: id and path, strings;
                           embedding, a fixed-size list of that dtype, uncompressed. The schema's
                           metadata has collection.json's content under the key "npclip"
    part-00000.npy         or, in the other format: [n, D], little-endian,
    part-00000.ids.jsonl   and {"id": ..., "path": ...} a line for each row of it
    errors.jsonl           {"id", "path", "reason"} a line: what could not be embedded, each id once
    part-00001.journal     the rows since the last shard, journal.py; only a Writer reads it
    writer.lock            locked by the Writer, if there is one

Without npclip: in DuckDB SELECT * FROM 'photos/*.parquet', in pyarrow
dataset(sorted(glob("photos/*.parquet"))), in NumPy load("photos/part-00000.npy", mmap_mode="r").
Ids and paths may hold any characters; those that UTF-8 has none for, of file names in other
encodings, are written as ids.py says.

Shards appear whole, under a temporary name first, and are never changed. Parquet's pages have
checksums, .npy files have none. A core decodes about 0.35 GB/s of Parquet; .npy is mapped. Opening
a Writer reads all ids: a second or two a million from Parquet, three times that from JSON.
"""

from __future__ import annotations

from .reader import Reader
from .writer import Writer

__all__ = ["Reader", "Writer"]
