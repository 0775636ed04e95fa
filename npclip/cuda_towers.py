"""The towers on a GPU: inputs from the host or the device, in batches, small ones as CUDA graphs.

A batch of up to 64 is filled up to the next power of two and replayed as one graph: its hundred
launches then cost one. Each graph has its own buffers and runs for one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ops
from .config import Config, Metadata
from .cuda import Levels
from .cuda_device import Captured, Device, Sequences
from .cuda_launch import DTYPES
from .cuda_preprocess import normalize_table, preprocess_on_device
from .errors import InputError
from .inputs import gpu_of
from .model import encode_image, encode_tokens
from .ops import Array, Parameters

LARGEST_GRAPH = 64  # images or texts; what is larger hides its launches


def round_up_to_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


class Graphs:
    """Graphs of one function of one device, by the shapes of its inputs."""

    def __init__(self, device: Device, function: Callable[..., Array]) -> None:
        """function: of device arrays, its result depends on nothing else."""
        self.device, self.function = device, function
        self._graphs: dict[Any, tuple[threading.Lock, list[Array], Captured]] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Array) -> Array:
        """function(*inputs), as a graph that is captured at the first call with such shapes."""
        device, key = self.device, tuple((x.shape, str(x.dtype)) for x in inputs)
        with self._lock:
            if key not in self._graphs:
                buffers = [device.copy(x) for x in inputs]
                captured = device.capture(partial(self.function, *buffers))
                self._graphs[key] = threading.Lock(), buffers, captured
        lock, buffers, captured = self._graphs[key]
        with lock:
            return device.replay(captured, buffers, inputs)


class Towers:
    """encode_image and encode_text of a model whose parameters lie on a device."""

    def __init__(
        self,
        device: Device,
        params: Parameters,
        config: Config,
        metadata: Metadata,
        dtype: str,
    ) -> None:
        """params: {"image": ..., "text": ...} or one of them, as ops.prepare leaves them."""
        self.device, self.params, self.config, self.dtype = device, params, config, dtype
        self.metadata, self._table = metadata, normalize_table(device, metadata)
        self._images = Graphs(device, self._encode_pixels)
        self._bytes = Graphs(device, self._encode_bytes)
        self._texts = Graphs(device, self._encode_tokens)

    def as_device_images(self, x: Any) -> Array | None:
        """x as an array on this device, if it is one of any library's on a GPU; else None."""
        return None if gpu_of(x) is None else self.device.take_over(x)

    def image_batches(self, x: Array, size: int) -> tuple[Iterator[Array], bool]:
        """Batches of <= size images of an array on the device, and whether it is one image.

        x: float [B, 3, R, R] or [3, R, R], preprocessed, or uint8 RGB [B, H, W, 3] or [H, W, 3],
            which is resized, cropped and normalised here, to the bits of CLIP.preprocess.
        """
        side, single = self.config.image_resolution, x.ndim == 3
        images = x[None] if single else x
        if images.ndim == 4 and images.dtype == np.uint8 and images.shape[3] == 3:
            parts = (images[i : i + size] for i in range(0, len(images), size))
            return map(self._as_pixels, parts), single
        if images.dtype.kind != "f" or images.shape[1:] != (3, side, side):
            raise InputError(
                f"an array on a GPU must be preprocessed pixels [B, 3, {side}, {side}] or uint8 "
                f"RGB [B, H, W, 3], not {x.dtype} {list(x.shape)}"
            )
        return (images[i : i + size] for i in range(0, len(images), size)), single

    def _as_pixels(self, images: Array) -> Array:
        """uint8 [B, H, W, 3] as encode_image takes them: as they are where R is H and W."""
        side = self.config.image_resolution
        if images.shape[1:3] == (side, side) and self.device.has_kernels:
            return images
        return preprocess_on_device(self.device, images, side, self.metadata, self._table)

    def encode_image(self, images: Array) -> Array:
        """Images on the host or the device -> float32 [B, E] on the device.

        images: float [B, 3, R, R], preprocessed, or uint8 RGB [B, R, R, 3].
        """
        count = len(images)
        if not count:
            return self.device.empty((0, self.config.embed_dim), "f32")
        images, graphs = self.device.asarray(images), self._bytes
        if images.dtype != np.uint8:
            images, graphs = self.device.cast(images, self.dtype), self._images
        if not self._has_graphs(count):
            return graphs.function(images)
        return graphs(self.device.fill_up(images, round_up_to_power(count)))[:count]

    def _has_graphs(self, count: int) -> bool:
        return count <= LARGEST_GRAPH and self.device.has_kernels

    def _encode_bytes(self, images: Array) -> Array:
        return self._encode_pixels(Levels(images, self._table, DTYPES[self.dtype]))

    def _encode_pixels(self, images: Array) -> Array:
        return encode_image(images, self.params["image"], self.config)

    def encode_text(self, ids: NDArray[Any]) -> Array:
        """Token ids [B, L] on the host -> float32 [B, E] on the device."""
        count = len(ids)
        if not count:
            return self.device.empty((0, self.config.embed_dim), "f32")
        packed = ops.pack_tokens(ids)
        if not self.device.has_kernels:
            return encode_tokens(*packed, self.params["text"], self.config)
        if self._has_graphs(count):
            filled = fill_up_tokens(*packed, self.config.context_length)
            return self._texts(*map(self.device.asarray, filled))[:count]
        longest = int(np.diff(packed[2]).max())
        tokens, positions, seqs, last = (self.device.asarray(a.astype(np.int32)) for a in packed)
        return self._encode_tokens(tokens, positions, seqs, last, longest)

    def _encode_tokens(
        self, tokens: Array, positions: Array, seqs: Array, last: Array, longest: int = 0
    ) -> Array:
        """longest: of the texts, if it is known; a graph takes any."""
        sequences = Sequences(seqs, longest or self.config.context_length)
        return encode_tokens(tokens, positions, sequences, last, self.params["text"], self.config)


def fill_up_tokens(
    tokens: Array, positions: Array, seqs: Array, last: Array, longest: int
) -> Iterator[NDArray[np.int32]]:
    """Packed texts with so many more that all shapes are powers of two, or follow from them.

    What is added are texts of token 0, up to `longest` tokens each, and empty ones; nobody reads
    them. Sequences: as many as the rows of `last`, and enough for any number of added tokens.
    """
    total = max(16, round_up_to_power(len(tokens)))
    texts = round_up_to_power(len(last))
    sequences = texts + -(-total // longest)
    added = np.arange(len(tokens), total, dtype=np.int32) - len(tokens)
    ends = np.minimum(np.arange(1, sequences - len(last) + 1) * longest, len(added)) + len(tokens)
    yield np.append(tokens, np.zeros_like(added)).astype(np.int32)
    yield np.append(positions, added % longest).astype(np.int32)
    yield np.append(seqs, ends).astype(np.int32)
    yield np.append(last, np.zeros(texts - len(last))).astype(np.int32)
