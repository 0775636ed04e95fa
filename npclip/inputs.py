"""What users pass to encode_image and encode_text -> batches of checked arrays."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import threads
from .errors import ImageError, InputError, InputTypeError

__all__ = ["ImageInput", "image_batches", "text_batches"]

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any]"
Batches: TypeAlias = Iterator[NDArray[Any]]
DLPACK_CUDA = 2, 13  # kDLCUDA and kDLCUDAManaged


def image_batches(
    x: Any, preprocess: Callable[[Any], NDArray[np.float32]], resolution: int, size: int
) -> tuple[Batches, bool]:
    """float32 batches [<= size, 3, R, R] of what encode_image takes, and whether x is one image."""
    x = _unwrap(x)
    if isinstance(x, np.ndarray) and x.ndim == 4 and x.dtype.kind == "f":
        _check_pixels(x, (len(x), 3, resolution, resolution))
        parts = (x[i : i + size] for i in range(0, len(x), size))
        return (np.asarray(part, np.float32) for part in parts), False
    if _is_image(x):
        return iter([as_pixels(x, preprocess, resolution)[None]]), True
    if not isinstance(x, Iterable):
        raise InputTypeError(f"an image or images expected, not {type(x).__name__}")
    # GPUs are asked in this thread, whose stream writes what lies there, and not in the pool's.
    images = map(_from_gpu, x)
    return _stacked(enumerate(images), partial(_numbered, preprocess, resolution), size), False


def _unwrap(x: Any) -> Any:
    """Arrays of other libraries as NumPy's, NumPy's arrays of strings or objects as lists.

    Looks at the type only: the __array_interface__ of a PIL image decodes and copies it.
    """
    if isinstance(x, (str, bytes)) or _is_pil(x):
        return x  # NumPy's own str and bytes have __array__, too
    x = _from_gpu(x)
    if hasattr(type(x), "__array__") or hasattr(type(x), "__array_interface__"):
        x = np.asarray(x)
        return x.tolist() if x.dtype.kind in "OSTU" else x
    return _from_dlpack(x) if hasattr(type(x), "__dlpack__") else x


def _from_dlpack(x: Any) -> NDArray[Any]:
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:
        raise InputTypeError(f"cannot read {type(x).__name__} by DLPack: {error}") from error


def _from_gpu(x: Any) -> Any:
    """A host copy of what lies on an NVIDIA GPU, of any library; anything else as it is.

    Raises BackendError where that GPU cannot be used through CuPy.
    """
    if (ordinal := gpu_of(x)) is None:
        return x
    from . import cuda_device

    device = cuda_device.open_device(ordinal)
    return device.asnumpy(device.take_over(x))


def gpu_of(x: Any) -> int | None:
    """The number of the NVIDIA GPU on which an array of any library lies; None for all else.

    0 where the library does not say which: CuPy finds out.
    """
    if _is_pil(x):
        return None
    if hasattr(type(x), "__dlpack_device__"):
        kind, ordinal = x.__dlpack_device__()
        return int(ordinal) if kind in DLPACK_CUDA else None
    return 0 if hasattr(x, "__cuda_array_interface__") else None


def _is_pil(x: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # not imported, or only just: no image of it exists
    return isinstance(x, getattr(module, "Image", ()))


def _is_image(x: Any) -> bool:
    """True for one image; an array [B, H, W, 3] is a list of them."""
    if isinstance(x, np.ndarray):
        return x.ndim != 4
    return isinstance(x, (str, os.PathLike, bytes, bytearray)) or _is_pil(x)


def _numbered(
    preprocess: Callable[[Any], Any], resolution: int, item: tuple[int, Any]
) -> NDArray[np.float32]:
    index, x = item
    try:
        return as_pixels(x, preprocess, resolution)
    except (ImageError, InputError, InputTypeError) as error:
        raise type(error)(f"image {index}: {error}") from error


def as_pixels(x: Any, preprocess: Callable[[Any], Any], resolution: int) -> NDArray[np.float32]:
    """[3, R, R] of an image that may be that already. Raises InputError and as preprocess does."""
    x = _unwrap(x)
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return preprocess(x)
    _check_pixels(x, (3, resolution, resolution))
    return np.asarray(x, np.float32)


def _check_pixels(array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        batch = "B, " if len(shape) == 4 else ""
        raise InputError(
            f"a float array must be preprocessed pixels [{batch}3, {shape[-1]}, {shape[-1]}], "
            f"not {list(array.shape)}; images as arrays are uint8 RGB [H, W, 3]"
        )


def text_batches(
    x: Any,
    tokenize: Callable[..., NDArray[np.int32]],
    context_length: int,
    vocab_size: int,
    size: int,
) -> tuple[Batches, bool]:
    """Token id batches [<= size, L] of what encode_text takes, and whether x is one text."""
    x = _unwrap(x)
    if isinstance(x, str):
        return iter([tokenize([str(x)])]), True
    if isinstance(x, (list, tuple)) and x and not isinstance(x[0], str):
        x = _integers(x)
    if isinstance(x, np.ndarray):
        ids = _check_ids(x, context_length, vocab_size)
        batch = ids if ids.ndim == 2 else ids[None]
        return (batch[i : i + size] for i in range(0, len(batch), size)), ids.ndim == 1
    if isinstance(x, (bytes, bytearray)) or not isinstance(x, Iterable):
        raise InputTypeError(f"a text, texts or token ids expected, not {type(x).__name__}")
    return _tokenized(iter(x), tokenize, size), False


def _integers(x: Any) -> NDArray[Any]:
    try:
        array = np.asarray([_unwrap(ids) for ids in x])
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iu":
        raise InputTypeError(f"texts or token ids expected, not a list of {type(x[0]).__name__}")
    return array


def _tokenized(x: Iterator[str], tokenize: Callable[..., Any], size: int) -> Batches:
    for first in count(0, size):
        if not (texts := list(islice(x, size))):
            return
        texts = [str(t) if isinstance(t, np.str_) else t for t in texts]
        yield tokenize(texts, first_index=first)


def _check_ids(ids: NDArray[Any], context_length: int, vocab_size: int) -> NDArray[Any]:
    if ids.dtype.kind not in "iu":
        raise InputError(f"token ids must be integers, not {ids.dtype}")
    if ids.ndim not in (1, 2) or not 1 <= ids.shape[-1] <= context_length:
        raise InputError(f"token ids must be [B, {context_length}], not {list(ids.shape)}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise InputError(
            f"token ids must lie in 0 .. {vocab_size - 1}, not {ids.min()} .. {ids.max()}"
        )
    return ids


def _stacked(
    items: Iterator[Any], pixels: Callable[[Any], NDArray[np.float32]], size: int
) -> Batches:
    decoded = in_threads(items, pixels)
    while batch := list(islice(decoded, size)):
        stacked = np.stack(batch)
        del batch
        yield stacked
        del stacked


def in_threads(items: Iterator[Any], pixels: Callable[[Any], Any]) -> Iterator[Any]:
    """pixels of every item, in order, in as many threads as the kernels use."""
    from concurrent.futures import ThreadPoolExecutor  # not at import: it takes its time

    count = threads.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        running = deque(pool.submit(pixels, item) for item in islice(items, 2 * count))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(pixels, item) for item in islice(items, 1))
