"""AdamW as the CLIP paper uses it, with its schedule and clipping by the gradients' global norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .. import threads
from ..errors import InputError
from ..kernels import reference_backward
from ..ops import Array, is_device_array
from . import ops
from .parameters import Flat

BLOCK = 1 << 16  # elements that NumPy updates at a time: all of their arrays stay in the L2 cache
NO_DECAY = ("bn", "ln", "bias", "logit_scale")  # in names, as in open_clip


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters; by default the paper's for Vision Transformers.

    learning_rate rises linearly over `warmup` steps, then falls to 0 at step `steps` as a cosine.
    weight_decay is decoupled. max_norm: gradients of a larger global norm are scaled down to it;
    None never does. Raises InputError for values that mean nothing.
    """

    steps: int
    learning_rate: float = 5e-4
    warmup: int = 0
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        good = {
            "steps": self.steps >= 1,
            "warmup": 0 <= self.warmup <= self.steps,
            "learning_rate": 0 <= self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "eps": self.eps > 0,
            "max_norm": self.max_norm is None or self.max_norm > 0,
        }
        for field, is_good in good.items():
            if not is_good:
                raise InputError(f"AdamW: {field} cannot be {getattr(self, field)!r}")

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))

    def clip_factor(self, norm: float) -> float:
        """What gradients of this global norm are multiplied with."""
        return 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))

    def update(
        self, params: Flat, gradients: Flat, m: Flat, v: Flat, step: int, factor: float = 1.0
    ) -> None:
        """Change the parameters that have a gradient, and their moments m and v, in place.

        factor: multiplies the gradients.
        """
        rate, (beta1, beta2) = self.learning_rate_at(step), self.betas
        correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        betas = beta1, 1 - beta1, beta2, 1 - beta2
        rest = correction2**-0.5, self.eps, rate / correction1

        def change(name: str) -> None:
            keep = 1 - rate * self.weight_decay if decays(name, params[name]) else 1.0
            arrays = [x[name] for x in (params, gradients, m, v)]
            arrays = [x if x.ndim else x.reshape(-1) for x in arrays]
            _adamw(*arrays, factor, *betas, keep, *rest)

        if all(map(_is_numpys, gradients.values())):
            threads.map_weights(change, gradients)  # NumPy's loops let other threads run
        else:
            for name in gradients:
                change(name)


def _is_numpys(p: Array) -> bool:
    return ops.backend(p) is reference_backward and not is_device_array(p)


def _adamw(p: Array, g: Array, m: Array, v: Array, *coefficients: float) -> None:
    rows = max(1, BLOCK * len(p) // p.size) if _is_numpys(p) else len(p)
    for i in range(0, len(p), rows):
        ops.backend(p).adamw(*(x[i : i + rows] for x in (p, g, m, v)), *coefficients)


def decays(name: str, array: Array) -> bool:
    """Whether weight decay applies: to matrices and to embeddings of tokens and positions, not to
    gains, biases, class_embedding and logit_scale (open_clip's rule)."""
    return array.ndim >= 2 and not any(part in name for part in NO_DECAY)


def global_norm(gradients: Flat) -> float:
    """The L2 norm of all gradients together; NaN or infinite where one of them is."""
    squares = [x for g in gradients.values() for x in _square_sums(g)]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan


def _square_sums(x: Array) -> list[float]:
    return [float(np.vdot(x, x))] if is_device_array(x) else ops.backend(x).square_sums(x).tolist()
