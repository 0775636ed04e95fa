"""CLIP in Ray Data's pipelines: classes for map_batches, a model an actor.

    import ray
    from npclip.ray import ImageEmbedder

    images = ray.data.read_binary_files("photos", include_paths=True)
    embedded = images.map_batches(
        ImageEmbedder,
        fn_constructor_kwargs={"model": "ViT-B/32"},
        batch_size=256,
        num_cpus=4,  # its threads; and num_gpus=1 for a GPU
        concurrency=2,
    )
    embedded.select_columns(["path", "embedding"]).write_parquet("embeddings")

`npclip embed --engine ray`, engine.py, is for collections of npclip: resumed, each id once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import threads
from ..bulk import Options, embedded
from ..clip import load
from ..errors import ImageError, InputError
from ..sources import Item, Kind
from ..sources.items import ERRORS, read_file, text_item

Batch = dict[str, NDArray[Any]]  # by column, rows along the first axis


class _Embedder:
    kind: ClassVar[Kind]
    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: str | os.PathLike[str] = "ViT-B/32",
        *,
        device: str | None = None,
        dtype: str | None = None,
        normalize: bool = True,
        download_root: str | os.PathLike[str] | None = None,
        activation: str | None = None,
        column: str | None = None,
        output: str = "embedding",
        on_error: str = "raise",
        **options: Any,
    ) -> None:
        if on_error not in ("raise", "null"):
            raise InputError(f'on_error must be "raise" or "null", not {on_error!r}')
        self.column, self.output, self.on_error = column, output, on_error
        self._options = Options(self.kind, normalize, **options)
        device = device or _as_assigned()
        self._model = load(model, device, dtype, download_root, (self.kind,), activation)

    def __call__(self, batch: Batch) -> Batch:
        values = batch[self._column(batch)]
        embeddings = np.full((len(values), self._model.config.embed_dim), np.nan, np.float32)
        errors = np.full(len(values), "", object)
        for some in embedded(self._items(values), self._model, self._options):
            embeddings[[int(item.id) for item in some.items]] = some.embeddings
            for item, reason in some.failed:
                errors[int(item.id)] = reason
        if self.on_error == "null":
            return {**batch, self.output: embeddings, "error": errors}
        for row, reason in enumerate(errors):
            if reason:
                where = f", {batch['path'][row]}" if "path" in batch else ""
                raise ERRORS[self.kind](f"row {row} of a batch{where}: {reason}")
        return {**batch, self.output: embeddings}

    def _column(self, batch: Batch) -> str:
        for name in (self.column,) if self.column is not None else self.columns:
            if name in batch:
                return name
        wanted = self.column or ", ".join(self.columns)
        raise InputError(f"no column {wanted} among {', '.join(batch)}: see column=")

    def _items(self, values: NDArray[Any]) -> Iterator[Item]:
        for row, value in enumerate(values):
            yield Item(str(row), "", self._reader(value))

    def _reader(self, value: Any) -> Callable[[], Any]:
        raise NotImplementedError


class ImageEmbedder(_Embedder):
    """Adds the embeddings of the images in a batch; for Ray Data's map_batches."""

    kind = "image"
    columns = "image", "bytes", "path"

    def __init__(
        self,
        model: str | os.PathLike[str] = "ViT-B/32",
        *,
        max_pixels: int | None = None,
        fast_decode: bool = False,
        **options: Any,
    ) -> None:
        """Loads the model: once an actor.

        model: as Embedder takes it.
        max_pixels, fast_decode: as bulk.embed() takes them.
        options: device, dtype, normalize, download_root, activation, as Embedder takes them;
            without device it is the GPU where Ray gave the actor one (num_gpus=), else the CPU.
            column, of the images: by default "image", "bytes" or "path", whichever comes first,
            as read_images, read_binary_files and paths are called. output, the column that is
            added. on_error: "raise" ends the job at an image that cannot be used; "null" adds the
            column "error", the reason, or "" where there is none, and the embedding is NaN then,
            which no comparison takes for a match.

        In an actor as many threads decode, and compute on the CPU, as it has num_cpus, or
        NPCLIP_NUM_THREADS. Raises what npclip.load() does, and InputError for other arguments.
        """
        super().__init__(model, max_pixels=max_pixels, fast_decode=fast_decode, **options)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, with float32 [n, D] as one more column.

        batch: n images by column: encoded bytes, local paths, or uint8 arrays [H, W], [H, W, 3] or
            [H, W, 4]. Encoded images give openai/CLIP's embeddings to the bit; read_images has
            converted them (to mode=) before.

        Raises InputError where there is no such column, ImageError for what cannot be used.
        """
        return super().__call__(batch)

    def _reader(self, value: Any) -> Callable[[], Any]:
        return partial(_image, value)


class TextEmbedder(_Embedder):
    """Adds the embeddings of the texts in a batch; for Ray Data's map_batches."""

    kind = "text"
    columns = ("text",)

    def __init__(
        self, model: str | os.PathLike[str] = "ViT-B/32", *, truncate: bool = False, **options: Any
    ) -> None:
        """As ImageEmbedder, with "text" as the column.

        truncate: cut texts that are too long, which are errors otherwise.
        """
        super().__init__(model, truncate=truncate, **options)

    def __call__(self, batch: Batch) -> Batch:
        """The batch, with float32 [n, D] as one more column.

        Raises InputError where there is no such column, or for a text that is none or is too long.
        """
        return super().__call__(batch)

    def _reader(self, value: Any) -> Callable[[], Any]:
        return text_item("", "", value).read


def _image(value: Any) -> Any:
    """What load_image takes, but paths, whose files are read here. Raises ImageError."""
    if isinstance(value, dict):  # datasets.Image of Hugging Face
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ImageError("nothing instead of an image")
    return read_file(str(value)) if isinstance(value, str) else value


def _as_assigned() -> str | None:
    """In an actor: its device, and as many threads from now on as it has CPUs."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None
    if not os.environ.get("NPCLIP_NUM_THREADS"):
        threads.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 1))))
    return "cuda" if ray.get_gpu_ids() else "cpu"
