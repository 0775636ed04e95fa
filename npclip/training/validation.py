"""How good a model is that is being trained: on held-out pairs, and on images with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops, threads
from ..clip import CLIP, TOWERS, asnumpy
from ..config import Config, Metadata
from ..errors import NpclipError
from ..evaluation import evaluate
from ..evaluation.image_folder import ImageFolder
from ..evaluation.retrieval import recall
from ..params import nest
from ..preprocess import load_image
from .augment import on_ground
from .data import shuffled
from .index import Index
from .loss import contrastive
from .state import State

IMAGES_AT_A_TIME = 256


def as_model(state: State, config: Config, metadata: Metadata, device: str) -> CLIP:
    """A model of the parameters as they are now, as npclip.load would give it."""
    host = {name: asnumpy(array) for name, array in state.params.items()}
    device, dtype = ops.resolve(device)
    params = ops.prepare(nest(host, config, TOWERS), dtype, lambda: None, device)
    return CLIP(config, metadata, params, device, dtype)


@dataclass(frozen=True)
class Validation:
    """What is evaluated: pairs and a folder for each class, or one of them.

    background: what is transparent is laid on it, as by augment.on_ground. batch: of the loss.
    """

    pairs: Index | None
    classes: ImageFolder | None
    batch: int
    templates: str | None = None
    background: str | None = None
    workers: int | None = None
    max_pixels: int | None = None

    def __call__(self, model: CLIP) -> dict[str, float]:
        """Of pairs: loss, image_to_text@k and text_to_image@k (see evaluation.recall), pairs, and
        how many are unreadable; of classes: zero_shot@1, and zero_shot@5 of more than 5."""
        found: dict[str, float] = {}
        if self.pairs is not None:
            found |= self._retrieval(model, self.pairs)
        if self.classes is not None:
            images = self._labelled(self.classes)
            result = evaluate(model, images, self.classes.labels, self.templates, cache=False)
            found["zero_shot@1"] = result.top1
            found |= {} if result.top5 is None else {"zero_shot@5": result.top5}
        return found

    def _retrieval(self, model: CLIP, index: Index) -> dict[str, float]:
        numbers: dict[str, int] = {}  # of the different texts
        features, of_pairs = [], list[tuple[int, int]]()
        first_texts: list[int] = []
        with ThreadPoolExecutor(self.workers or threads.get_num_threads()) as pool:
            waiting: Iterator[int] = iter(range(len(index)))
            while some := list(islice(waiting, IMAGES_AT_A_TIME)):
                pixels = list(pool.map(lambda i: self._pixels(model, index, i), some))
                readable = [i for i, one in zip(some, pixels, strict=True) if one is not None]
                batch = [one for one in pixels if one is not None]
                features.append(asnumpy(model.encode_image(batch, normalize=True)))
                for i in readable:
                    ids = [numbers.setdefault(t, len(numbers)) for t in index[i].texts]
                    of_pairs += [(len(first_texts), id) for id in ids]
                    first_texts.append(ids[0])
        found: dict[str, float] = {
            "pairs": len(first_texts),
            "unreadable": len(index) - len(first_texts),
        }
        if not first_texts:
            return found
        images = np.concatenate(features)
        texts = asnumpy(model.encode_text(list(numbers), normalize=True, truncate=True))
        loss = self._loss(images, texts[first_texts], model.logit_scale)
        return {"loss": loss, **recall(images, texts, of_pairs), **found}

    def _loss(self, images: NDArray[Any], texts: NDArray[Any], logit_scale: Any) -> float:
        """The mean of batches as in training, always the same ones."""
        count, size = len(images), min(self.batch, len(images))
        order = shuffled(np.arange(count), count, [0])[: count // size * size].reshape(-1, size)
        scale = np.asarray(logit_scale)
        return float(np.mean([contrastive(images[i], texts[i], scale).value for i in order]))

    def _pixels(self, model: CLIP, index: Index, i: int) -> NDArray[np.float32] | None:
        try:
            image = load_image(index.read(index[i]), self.max_pixels)
            return model.preprocess(on_ground(image, self.background))
        except NpclipError:
            return None

    def _labelled(self, images: ImageFolder) -> Iterable[tuple[Any, str]]:
        if self.background is None:
            yield from images
            return
        for item, label in images:
            try:
                image = load_image(item.read(), self.max_pixels)
                yield on_ground(image, self.background), label
            except NpclipError:
                yield item, label  # which evaluate() finds unreadable, too
