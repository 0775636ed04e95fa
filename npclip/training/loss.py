"""CLIP's contrastive loss with a learned temperature, and what it knows on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..kernels.reference_backward import contrastive_loss
from ..ops import Array
from . import ops

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Loss:
    """The loss of a batch and its gradients."""

    value: float
    image_accuracy: float  # of images whose own text is the most similar in the batch
    text_accuracy: float  # of texts, likewise
    dimages: Array  # [B, E]
    dtexts: Array  # [B, E]
    dlogit_scale: Array  # []


def contrastive(images: Array, texts: Array, logit_scale: Array) -> Loss:
    """Symmetric InfoNCE of features [B, E] that are not normalised yet; image i belongs to text i.

    logit_scale []: the logarithm of what cosines are multiplied with. Raises InputError where the
    shapes differ.
    """
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise InputError(f"contrastive: images {images.shape} and texts {texts.shape} do not pair")
    a, b = ops.l2_normalize(images), ops.l2_normalize(texts)
    value, da, db, dlogit_scale = contrastive_loss(a, b, logit_scale)
    cosines = a @ b.T
    own = ops.like(np.arange(len(images)), cosines)
    return Loss(
        float(value),
        float((cosines.argmax(1) == own).mean()),
        float((cosines.argmax(0) == own).mean()),
        ops.l2_normalize_backward(images, da),
        ops.l2_normalize_backward(texts, db),
        dlogit_scale,
    )
