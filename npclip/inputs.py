"""What users pass to encode_image and encode_text -> batches of checked arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import ImageError, InputError
from .preprocess import load_image

__all__ = ["ImageInput", "image_batches", "load_image", "text_batches"]

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any]"
Batches: TypeAlias = Iterator[NDArray[Any]]


def image_batches(
    x: Any, preprocess: Callable[[Any], NDArray[np.float32]], resolution: int, size: int
) -> tuple[Batches, bool]:
    """float32 batches [<= size, 3, R, R] of what encode_image takes, and whether x is one image."""
    if _is_image(x):
        array = _as_array(x)
        if array is not None and array.ndim == 4 and array.dtype.kind == "f":
            _check_pixels(array, (array.shape[0], 3, resolution, resolution))
            parts = (array[i : i + size] for i in range(0, len(array), size))
            return (np.asarray(part, np.float32) for part in parts), False
        if array is None or array.ndim != 4:
            return iter([_pixels(x, preprocess, resolution)[None]]), True
        x = array  # uint8 [B, H, W, 3]: as a list of images
    if not isinstance(x, Iterable):
        raise TypeError(f"an image or images expected, not {type(x).__name__}")
    return _stack(_numbered(x, preprocess, resolution), size), False


def _is_image(x: Any) -> bool:
    return isinstance(x, (str, os.PathLike, bytes, bytearray)) or _has_array(x)


def _has_array(x: Any) -> bool:
    """True for NumPy arrays, PIL images, and tensors of other libraries on the host."""
    return hasattr(x, "__array__") or hasattr(x, "__array_interface__")


def _as_array(x: Any) -> NDArray[Any] | None:
    is_pil = hasattr(x, "convert") and hasattr(x, "mode")
    return np.asarray(x) if _has_array(x) and not is_pil else None


def _numbered(x: Iterable[Any], preprocess: Callable[[Any], Any], resolution: int) -> Batches:
    for index, item in enumerate(x):
        try:
            yield _pixels(item, preprocess, resolution)
        except (ImageError, InputError, TypeError) as error:
            raise type(error)(f"image {index}: {error}") from error


def _pixels(x: Any, preprocess: Callable[[Any], Any], resolution: int) -> NDArray[np.float32]:
    array = _as_array(x)
    if array is None:
        return preprocess(x)
    if array.dtype.kind != "f":
        return preprocess(array)
    _check_pixels(array, (3, resolution, resolution))
    return np.asarray(array, np.float32)


def _check_pixels(array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        batch = "B, " if len(shape) == 4 else ""
        raise InputError(
            f"a float array must be preprocessed pixels [{batch}3, {shape[-1]}, {shape[-1]}], "
            f"not {list(array.shape)}; images as arrays are uint8 RGB [H, W, 3]"
        )


def text_batches(
    x: Any,
    tokenize: Callable[[list[str]], NDArray[np.int32]],
    context_length: int,
    vocab_size: int,
    size: int,
) -> tuple[Batches, bool]:
    """Token id batches [<= size, L] of what encode_text takes, and whether x is one text."""
    if isinstance(x, str):
        return iter([tokenize([x])]), True
    if isinstance(x, (list, tuple)) and x and not isinstance(x[0], str):
        x = _integers(x)
    if _has_array(x) and np.asarray(x).dtype.kind not in "OU":
        ids = _check_ids(np.asarray(x), context_length, vocab_size)
        batch = ids if ids.ndim == 2 else ids[None]
        return (batch[i : i + size] for i in range(0, len(batch), size)), ids.ndim == 1
    if isinstance(x, (bytes, bytearray)) or not isinstance(x, Iterable):
        raise TypeError(f"a text, texts or token ids expected, not {type(x).__name__}")
    return _tokenized(iter(x), tokenize, size), False


def _integers(x: Any) -> NDArray[Any]:
    try:
        array = np.asarray(x)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iu":
        raise TypeError(f"texts or token ids expected, not a list of {type(x[0]).__name__}")
    return array


def _tokenized(x: Iterator[str], tokenize: Callable[[list[str]], Any], size: int) -> Batches:
    while texts := list(islice(x, size)):
        yield tokenize([str(t) if isinstance(t, np.str_) else t for t in texts])


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


def _stack(items: Batches, size: int) -> Batches:
    for first in items:
        yield np.stack(list(chain([first], islice(items, size - 1))))
