"""The towers on a GPU: inputs from the host or the device, in batches, small ones as CUDA graphs.

A batch of few tokens is filled up to one of a few sizes and replayed as one graph: its hundred
launches then cost one. Each graph has its own buffers and runs for one thread at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ops
from .config import Config, Metadata
from .cuda import Levels
from .cuda_attention import SHORT_KEYS
from .cuda_device import Captured, Device, Sequences
from .cuda_launch import DTYPES
from .cuda_preprocess import normalize_table, preprocess_on_device
from .errors import InputError
from .inputs import gpu_of
from .model import encode_image, encode_tokens
from .ops import Array, Parameters

GRAPH_TOKENS = 4096  # of a batch, at most; what is larger hides its launches
KEPT_GRAPHS = 64  # of one function


def graph_size(n: int) -> int:
    """n rounded up to 1, 1.25, 1.5 or 1.75 times a power of two: at most a quarter is wasted."""
    step = 1 << max(0, (n - 1).bit_length() - 3)
    return -(-n // step) * step


class Graphs:
    """Graphs of one function of one device, by the shapes of its inputs."""

    def __init__(self, device: Device, function: Callable[..., Array]) -> None:
        """function: of device arrays, its result depends on nothing else."""
        self.device, self.function = device, function
        self._graphs: OrderedDict[Any, tuple[threading.Lock, list[Array], Captured]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Array, **fixed: Any) -> Array:
        """function(*inputs, **fixed), as a graph: captured at the first call with such shapes."""
        device, key = self.device, (*[(x.shape, x.dtype) for x in inputs], *fixed.items())
        with self._lock:
            if key not in self._graphs:
                buffers = [device.copy(x) for x in inputs]
                captured = device.capture(partial(self.function, *buffers, **fixed))
                self._graphs[key] = threading.Lock(), buffers, captured
            self._graphs.move_to_end(key)
            while len(self._graphs) > KEPT_GRAPHS:
                self._graphs.popitem(last=False)
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
        if not self._has_graphs(count * (self.config.grid**2 + 1)):
            return graphs.function(images)
        return graphs(self.device.fill_up(images, graph_size(count)))[:count]

    def _has_graphs(self, tokens: int) -> bool:
        return tokens <= GRAPH_TOKENS and self.device.has_kernels

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
        longest = int(np.diff(packed[2]).max())
        if not self._has_graphs(len(packed[0])):
            return self._encode_tokens(*self._as_one(packed), longest)
        longest = min([keys for keys in SHORT_KEYS if keys >= longest], default=longest)
        longest = min(longest, self.config.context_length)  # there are no more positions
        joined, sizes = self._as_one(fill_up_tokens(*packed, longest))
        return self._texts(joined, sizes=sizes, longest=longest)[:count]

    def _as_one(self, arrays: Iterable[NDArray[Any]]) -> tuple[Array, tuple[int, ...]]:
        """Arrays as one int32 array on the device, copied at once, and their sizes."""
        arrays = list(arrays)
        joined = np.concatenate(arrays, dtype=np.int32)
        return self.device.asarray(joined), tuple(map(len, arrays))

    def _encode_tokens(self, joined: Array, sizes: tuple[int, ...], longest: int) -> Array:
        """joined: tokens, positions, seqs and last, one after the other."""
        bounds = pairwise([0, *accumulate(sizes)])
        tokens, positions, seqs, last = (joined[start:end] for start, end in bounds)
        sequences = Sequences(seqs, longest)
        return encode_tokens(tokens, positions, sequences, last, self.params["text"], self.config)


def fill_up_tokens(
    tokens: Array, positions: Array, seqs: Array, last: Array, longest: int
) -> Iterator[NDArray[np.int32]]:
    """Packed texts with so many more that all shapes are those of graph_size, or follow from them.

    What is added are texts of token 0, up to `longest` tokens each, and empty ones; nobody reads
    them. Sequences: as many as the rows of `last`, and enough for any number of added tokens.
    """
    total, texts = max(16, graph_size(len(tokens))), graph_size(len(last))
    sequences = texts + -(-total // longest)
    added = np.arange(len(tokens), total, dtype=np.int32) - len(tokens)
    ends = np.minimum(np.arange(1, sequences - len(last) + 1) * longest, len(added)) + len(tokens)
    yield np.append(tokens, np.zeros_like(added)).astype(np.int32)
    yield np.append(positions, added % longest).astype(np.int32)
    yield np.append(seqs, ends).astype(np.int32)
    yield np.append(last, np.zeros(texts - len(last))).astype(np.int32)
