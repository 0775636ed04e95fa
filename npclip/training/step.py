"""One step of training: exact gradients of a batch of any size, then the update.

The contrastive loss compares every image with every text of the batch, so a batch cannot be cut
into parts whose gradients are added. GradCache (Gao et al., 2021) cuts the encoders instead: the
features of all micro-batches first, without what their backward needs; the loss and its gradients
by the features, over the whole batch; then each micro-batch again, with its slice of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import InputError, TrainingError
from ..ops import Array, Parameters
from . import model, ops
from .loss import MAX_LOGIT_SCALE, Loss, contrastive
from .optim import AdamW, global_norm
from .parameters import Flat, Freeze, check_trainable, flatten, nested
from .state import State

ENCODERS: dict[str, tuple[Callable[..., Any], Callable[..., Parameters]]] = {
    "image": (model.encode_image, model.encode_image_backward),
    "text": (model.encode_text, model.encode_text_backward),
}
GROWTH_STEPS = 2000  # without overflow, after which the loss scale is doubled
MAX_LOSS_SCALE = 2.0**24


@dataclass(frozen=True)
class Step:
    """What is worth logging of a step."""

    loss: float
    image_accuracy: float
    text_accuracy: float
    gradient_norm: float  # before clipping
    learning_rate: float
    logit_scale: float  # the factor after the update, at most 100 where it is trained


def train_step(
    state: State,
    images: Array,
    ids: Array,
    config: Config,
    optimizer: AdamW,
    *,
    micro_batch: int | None = None,
    freeze: Freeze = Freeze(),  # noqa: B008 - immutable
    dtype: str = "float32",
    patch_dropout: float = 0.0,
) -> Step:
    """Change state by one step on images [B, 3, R, R] and their texts' token ids [B, L] (host).

    micro_batch: pairs that are encoded at a time; the result is that of the whole batch.
    dtype: how matrices and activations are stored, "float32", "float16" (with a loss scale, which
        is found on the way) or "bfloat16" (see parameters.nested); the state's own parameters stay
        as they are.
    patch_dropout: this share of each image's patches, drawn by state.rng, is left out after their
        embedding (Li et al., 2023: FLIP): faster, and a regularisation. 0 <= patch_dropout < 1.

    Raises TrainingError for a loss or gradient that is NaN or infinite, before anything but the
    loss scale and rng is changed; InputError for what cannot be trained or does not fit.
    """
    with ops.on_device_of(state.params["logit_scale"]):
        kept = draw_patches(state.rng, len(images), config.grid**2, patch_dropout)
        while True:
            scale = state.loss_scale if dtype == "float16" else 1.0
            loss, gradients = loss_and_gradients(
                state.params, images, ids, config, micro_batch, freeze, dtype, scale, kept
            )
            norm = global_norm(gradients) / scale
            if math.isfinite(norm):
                break
            if scale <= 1:
                raise TrainingError(_culprit(gradients))
            state.loss_scale, state.steady_steps = scale / 2, 0  # and once more
        factor = optimizer.clip_factor(norm) / scale
        optimizer.update(state.params, gradients, state.m, state.v, state.step, factor)
        logit_scale = state.params["logit_scale"]
        if "logit_scale" in gradients:
            np.minimum(logit_scale, MAX_LOGIT_SCALE, out=logit_scale)
        rate = optimizer.learning_rate_at(state.step)
        state.step += 1
        state.steady_steps += dtype == "float16"
        if state.steady_steps >= GROWTH_STEPS:
            state.loss_scale, state.steady_steps = min(2 * state.loss_scale, MAX_LOSS_SCALE), 0
        accuracies = loss.image_accuracy, loss.text_accuracy
        return Step(loss.value, *accuracies, norm, rate, math.exp(float(logit_scale)))


def draw_patches(
    rng: np.random.Generator, images: int, patches: int, dropout: float
) -> NDArray[np.intp] | None:
    """Which tokens of each image are kept, at least one patch: rows of model.encode_image's `kept`.
    None where all are, and then nothing is drawn."""
    if not 0 <= dropout < 1:
        raise InputError(f"patch_dropout must be within 0 .. 1, and not 1, not {dropout}")
    if not dropout:
        return None
    count = max(1, round(patches * (1 - dropout)))
    drawn = np.argsort(rng.random((images, patches)), axis=1, kind="stable")[:, :count]
    return np.concatenate([np.zeros((images, 1), np.intp), 1 + np.sort(drawn, axis=1)], axis=1)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is found afterwards
def loss_and_gradients(
    params: Flat,
    images: Array,
    ids: Array,
    config: Config,
    micro_batch: int | None = None,
    freeze: Freeze = Freeze(),  # noqa: B008 - immutable
    dtype: str = "float32",
    loss_scale: float = 1.0,
    kept: NDArray[np.intp] | None = None,
) -> tuple[Loss, Flat]:
    """The loss of a batch, and loss_scale times the gradients of what is not frozen, by name.

    kept: of draw_patches. Other arguments and errors are those of train_step; a TrainingError here
    is the loss's.
    """
    check_trainable(config)
    stages = {tower: freeze.stages(tower, config) for tower in ENCODERS}
    _check_batch(images, ids, config)
    size = len(images) if micro_batch is None else micro_batch
    if size < 1:
        raise InputError(f"micro_batch must be positive, not {micro_batch}")
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    p = nested(params, config, dtype)
    full = params["logit_scale"].dtype

    def encode(tower: str, part: slice) -> Any:
        if tower == "text":
            return ENCODERS[tower][0](ids[part], p[tower], config)
        x = ops.like(images[part].astype(full, copy=False), params["logit_scale"])
        return ENCODERS[tower][0](x, p[tower], config, None if kept is None else kept[part])

    features, tapes = {}, {}
    for tower in ENCODERS:
        if len(parts) == 1:
            features[tower], tapes[tower] = encode(tower, parts[0])
        else:
            features[tower] = np.concatenate([encode(tower, part)[0] for part in parts])
    loss = contrastive(features["image"], features["text"], params["logit_scale"])
    if not math.isfinite(loss.value):
        raise TrainingError(f"the loss is {loss.value}")
    gradients: Flat = {}
    if not freeze.logit_scale:
        gradients["logit_scale"] = loss.dlogit_scale * full.type(loss_scale)
    for tower, dy in (("image", loss.dimages), ("text", loss.dtexts)):
        if (frozen := stages[tower]) is None:
            continue
        for part in parts:
            tape = tapes.pop(tower, None) or encode(tower, part)[1]
            nest = ENCODERS[tower][1](dy[part] * loss_scale, tape, p[tower], config, frozen)
            for name, gradient in flatten(nest, tower, config).items():
                if name in gradients:
                    gradients[name] += gradient
                else:
                    gradients[name] = gradient
    return loss, gradients


def _check_batch(images: Array, ids: Array, config: Config) -> None:
    resolution, length = config.image_resolution, config.context_length
    if images.ndim != 4 or images.shape[1:] != (3, resolution, resolution):
        raise InputError(f"images {images.shape} are not [B, 3, {resolution}, {resolution}]")
    if ids.shape != (len(images), length) or ids.dtype.kind not in "iu" or not len(ids):
        raise InputError(f"ids {ids.dtype} {ids.shape} are not integers [{len(images)}, {length}]")


def _culprit(gradients: Flat) -> str:
    for name, gradient in gradients.items():
        if not np.isfinite(gradient).all():
            return f"the gradient of {name} is NaN or infinite"
    return "the gradients are too large"
