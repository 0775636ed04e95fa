"""Embedder: CLIP as one object for other people's pipelines: lazily loaded, shared, pickled."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from .clip import CLIP, Float32, asnumpy, load, open_model
from .provenance import Provenance


class Embedder:
    """Images and texts to arrays of the host. Nothing is loaded before it is needed.

    Threads may share it. Pickled, as for the processes of a pool, it is its arguments: each process
    loads the model itself.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "ViT-B/32",
        *,
        device: str | None = None,
        dtype: str | None = None,
        normalize: bool = True,
        download_root: str | os.PathLike[str] | None = None,
        activation: str | None = None,
    ) -> None:
        """All arguments but normalize are those of npclip.load().

        normalize: divide each embedding by its L2 norm, so that dot products are cosines.
        """
        self.model, self.normalize = os.fspath(model), normalize
        self._options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "download_root": download_root,
            "activation": activation,
        }
        self._start()

    def _start(self) -> None:
        self._towers: dict[str, CLIP] = {}
        self._dimension: int | None = None
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        """As it is made, without what was left out."""
        given = [f"{name}={value!r}" for name, value in self._options.items() if value is not None]
        more = [] if self.normalize else ["normalize=False"]
        return f"Embedder({', '.join([repr(self.model), *given, *more])})"

    def __getstate__(self) -> dict[str, Any]:
        """The arguments."""
        return {"model": self.model, "normalize": self.normalize, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a new one with the same arguments."""
        self.__dict__.update(state)
        self._start()

    @property
    def dimension(self) -> int:
        """Length of an embedding. Of the checkpoint only the header is read for it.

        Raises what npclip.load() raises of the checkpoint.
        """
        with self._lock:
            if self._dimension is None:
                source = self._options["download_root"], self._options["activation"]
                self._dimension = open_model(self.model, *source)[1].embed_dim
            return self._dimension

    def preprocess(self, image: Any) -> Float32:
        """float32 [3, R, R] of one image, as the model takes it, which embed_images takes, too.

        For who decodes ahead, in threads of their own. image: as CLIP.preprocess takes it. Raises
        what that raises, and what npclip.load() does at the first call.
        """
        return self._tower("image").preprocess(image)

    def embed_images(self, images: Any) -> Float32:
        """float32 [B, dimension]; of one image [dimension].

        images: as CLIP.encode_image takes them; iterators are consumed in batches. Raises what it
        raises, and what npclip.load() does at the first call.
        """
        embeddings = self._tower("image").encode_image(images, normalize=self.normalize)
        return np.asarray(asnumpy(embeddings), np.float32)

    def embed_texts(self, texts: str | Iterable[str], truncate: bool = False) -> Float32:
        """float32 [B, dimension]; of one text [dimension].

        truncate: cut texts that are too long instead of raising TextTooLongError. Raises what
        CLIP.encode_text raises, and what npclip.load() does at the first call.
        """
        tower = self._tower("text")
        embeddings = tower.encode_text(texts, normalize=self.normalize, truncate=truncate)
        return np.asarray(asnumpy(embeddings), np.float32)

    def provenance(self) -> Provenance:
        """What tells its embeddings from another model's."""
        loaded = next(iter(self._towers.values()), None) or self._tower("text")
        return loaded.provenance(self.normalize)

    def _tower(self, name: str) -> CLIP:
        """The model with that tower alone: the other's weights are not read."""
        with self._lock:
            if name not in self._towers:
                self._towers[name] = load(self.model, towers=(name,), **self._options)
            return self._towers[name]
