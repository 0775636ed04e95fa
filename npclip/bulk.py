"""Embed whole collections: threads read and decode ahead of the encoder, a store keeps the rows.

    open_sources -> Items -> threads: read, decode -> encoder, a batch at a time -> store.Writer
                             an engine: here, or of ray/engine.py, in many processes

A row that is on disk is never computed again, so a run that was killed goes on where it stopped.
On the CPU an embedding does not depend on its batch: the result is that of an unbroken run, to the
bit.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import threads
from .clip import CLIP, Float32, asnumpy
from .errors import InputError, NpclipError
from .preprocess import load_image
from .provenance import Provenance
from .sources import Item, Kind, open_sources
from .store import Writer
from .tokenizer import tokenize

Input: TypeAlias = NDArray[Any]  # an item as the encoder takes it: pixels or token ids
Outcome: TypeAlias = "tuple[Item, Input | NpclipError]"

BATCH: dict[Kind, dict[str, int]] = {
    "image": {"cpu": 32, "cuda": 256},
    "text": {"cpu": 256, "cuda": 4096},
}
GROUP: dict[Kind, int] = {"image": 1, "text": 64}  # items that a thread takes at a time


@dataclass(frozen=True)
class Options:
    """How items become what the encoder takes, and embeddings."""

    kind: Kind = "image"
    normalize: bool = True
    max_pixels: int | None = None
    fast_decode: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for what contradicts itself."""
        if self.kind not in BATCH:
            raise InputError(f'kind must be "image" or "text", not {self.kind!r}')
        if self.fast_decode and self.kind != "image":
            raise InputError("fast_decode is for images")
        if self.truncate and self.kind != "text":
            raise InputError("truncate is for texts")
        at_least_1(max_pixels=self.max_pixels)


@dataclass
class Report:
    """What a run did, so far or in all."""

    embedded: int = 0  # rows written
    skipped: int = 0  # items whose ids the collection has, or that came twice
    failed: int = 0  # items listed in errors.jsonl
    seconds: float = 0.0

    @property
    def seen(self) -> int:
        """Items that are done with."""
        return self.embedded + self.skipped + self.failed


@dataclass(frozen=True)
class Embedded:
    """What became of some items."""

    items: list[Item]
    embeddings: Float32  # [len(items), D]
    failed: list[tuple[Item, str]]  # with the reason


Engine: TypeAlias = "Callable[[Iterator[Item]], Generator[Embedded, None, None]]"


def embed(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    model: CLIP,
    kind: Kind = "image",
    *,
    dtype: str = "float16",
    format: str = "parquet",
    normalize: bool = True,
    batch: int | None = None,
    workers: int | None = None,
    column: str | None = None,
    id_column: str | None = None,
    max_pixels: int | None = None,
    fast_decode: bool = False,
    truncate: bool = False,
    on_progress: Callable[[Report], None] | None = None,
) -> Report:
    """Embed every image or text of the sources into the collection out, which may exist.

    sources, column, id_column: as sources.open_sources takes them.
    out, dtype, format: a folder, and how it stores embeddings: see store.Writer.
    kind: "image" or "text".
    batch: items a call of the encoder. workers: threads that read and decode; by default as many
        as the CPU's kernels use.
    max_pixels: larger images fail before they are decoded; Pillow's own limit holds as well.
    fast_decode: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where that is no smaller than
        the model's: faster, and not what openai/CLIP computes. The provenance says so.
    truncate: cut texts that are too long; otherwise they fail.
    on_progress: called after every batch.

    An item that cannot be read or used goes to the collection's errors.jsonl with the reason, and
    is tried again by the next run. Raises InputError for sources that do not exist and for wrong
    arguments, ProvenanceError where out has embeddings of another kind, StoreError where it cannot
    be written, and what the model raises; all rows written till then are kept.
    """
    options = Options(kind, normalize, max_pixels, fast_decode, truncate)
    at_least_1(batch=batch, workers=workers)
    return collect(
        open_sources(paths(sources), kind, column=column, id_column=id_column),
        out,
        partial(embedded, model=model, options=options, batch=batch, workers=workers),
        model.provenance(normalize, fast_decode),
        kind,
        dtype=dtype,
        format=format,
        on_progress=on_progress,
    )


def collect(
    items: Iterator[Item],
    out: str | os.PathLike[str],
    engine: Engine,
    provenance: Provenance,
    kind: Kind,
    *,
    dtype: str,
    format: str,
    on_progress: Callable[[Report], None] | None,
) -> Report:
    """What the engine makes of the items that the collection out does not have.

    provenance: of the embeddings. Raises what embed() does, and what the engine raises.
    """
    first = list(islice(items, 1))  # raises where there is none, and nothing is written
    report, start = Report(), time.monotonic()
    with Writer(out, provenance, kind, dtype=dtype, format=format) as writer:
        fresh = not_yet_embedded(chain(first, items), writer, report)
        with closing(engine(fresh)) as done:
            for some in done:
                save(some, writer, report)
                report.seconds = time.monotonic() - start
                if on_progress:
                    on_progress(report)
    report.seconds = time.monotonic() - start
    return report


def not_yet_embedded(items: Iterable[Item], writer: Writer, report: Report) -> Iterator[Item]:
    """The items whose ids the collection does not have; the others are counted."""
    for item in items:
        if item.id in writer:
            report.skipped += 1
        else:
            yield item


def embedded(
    items: Iterator[Item],
    model: CLIP,
    options: Options,
    batch: int | None = None,
    workers: int | None = None,
) -> Generator[Embedded, None, None]:
    """The engine of this process: batch by batch, in order, decoded by threads ahead."""
    size = batch or default_batch(options.kind, model.device)
    with closing(decoded(items, model, options, workers, ahead=size)) as outcomes:
        while some := list(islice(outcomes, size)):
            yield encoded(some, model, options)


def decoded(
    items: Iterator[Item], model: CLIP, options: Options, workers: int | None, ahead: int
) -> Generator[Outcome, None, None]:
    """Each item with what it is to the encoder, or why it is nothing; in order.

    Threads are ahead by so many items, which bounds the memory.
    """
    count, group = workers or threads.get_num_threads(), GROUP[options.kind]

    def some(group: list[Item]) -> list[Outcome]:
        return [(item, _input(item, model, options)) for item in group]

    pool = ThreadPoolExecutor(count)
    try:
        running: deque[Future[list[Outcome]]] = deque()
        groups = iter(lambda: list(islice(items, group)), [])
        for next_group in groups:
            running.append(pool.submit(some, next_group))
            if len(running) > ahead // group + count:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(outcomes: Iterable[Outcome], model: CLIP, options: Options) -> Embedded:
    """A batch through the encoder."""
    items, inputs, failed = [], [], []
    for item, found in outcomes:
        if isinstance(found, NpclipError):
            failed.append((item, str(found)))
        else:
            items.append(item)
            inputs.append(found)
    encode = model.encode_image if options.kind == "image" else model.encode_text
    embeddings = encode(np.stack(inputs) if inputs else [], normalize=options.normalize)
    return Embedded(items, asnumpy(embeddings), failed)


def save(some: Embedded, writer: Writer, report: Report) -> None:
    """Write what became of some items, each id once."""
    rows = {item.id: i for i, item in reversed(list(enumerate(some.items)))}
    new = sorted(i for id, i in rows.items() if id not in writer)
    with np.errstate(over="ignore"):  # to infinity
        is_finite = np.isfinite(some.embeddings.astype(writer.dtype)).all(1)
    kept, broken = ([i for i in new if is_finite[i] == wanted] for wanted in (True, False))
    items = [some.items[i] for i in kept]
    writer.append([x.id for x in items], [x.path for x in items], some.embeddings[kept])
    reason = f"its embedding is not finite in {writer.dtype}"
    failed = [*some.failed, *((some.items[i], reason) for i in broken)]
    for item, reason in failed:
        writer.fail(item.id, item.path, reason)
    report.embedded += len(kept)
    report.skipped += len(some.items) - len(new)
    report.failed += len(failed)


def _input(item: Item, model: CLIP, options: Options) -> Input | NpclipError:
    try:
        read = item.read()
        if isinstance(read, str):
            length, size = model.context_length, model.vocab_size
            return tokenize([read], length, truncate=options.truncate, vocab_size=size)[0]
        side = model.visual.input_resolution if options.fast_decode else None
        return model.preprocess(load_image(read, options.max_pixels, side))
    except NpclipError as error:
        return error


def default_batch(kind: Kind, device: str) -> int:
    """Items a call of the encoder."""
    return BATCH[kind][device.partition(":")[0]]


def at_least_1(**values: int | None) -> None:
    """Raises InputError, by its name, for a number below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def paths(sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """As str, be it one or several."""
    many = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    return [os.fspath(source) for source in many]


def let_pillow_open(max_pixels: int | None) -> None:
    """Images of up to max_pixels in this process, also where Pillow's own limit is lower."""
    import PIL.Image

    limit = PIL.Image.MAX_IMAGE_PIXELS
    if max_pixels is not None and limit is not None:
        PIL.Image.MAX_IMAGE_PIXELS = max(max_pixels, limit)
