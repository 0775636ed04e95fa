"""Images -> the pixels that the image tower takes, bit-identical to openai/CLIP's preprocessing.

resize -> centre crop -> RGB -> float32 [3, size, size] -> / 255 -> - mean -> / std

The conversion to RGB comes after the resize: Pillow resizes palettes by nearest neighbour, and
weights pixels by their alpha, so converting first changes every such image. EXIF rotation is
ignored. All as in https://github.com/openai/CLIP/blob/main/clip/clip.py (_transform).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0 .. 1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED_PIXELS = 178_956_970  # before the crop; Pillow refuses to open larger images

ImageSource = Any  # str | os.PathLike[str] | bytes | bytearray | PIL.Image.Image | uint8 array


def load_image(source: ImageSource) -> Image:
    """A fully decoded PIL image, in the mode that it is stored in.

    source: a path, the bytes of an image file, a PIL image, or a uint8 array: RGB [H, W, 3],
        RGBA [H, W, 4], or grey [H, W] or [H, W, 1].

    Raises ImageError, saying why, if it cannot be read or decoded to its end, is empty, or is an
    array of another dtype or shape; TypeError for any other type.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _decode(source, "PIL image")
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(_check_array(source))
    if isinstance(source, (bytes, bytearray)):
        return _open(io.BytesIO(source), f"image of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _open(os.fspath(source), os.fspath(source))
    raise TypeError(
        f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}"
    )


def preprocess(
    image: ImageSource,
    size: int,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    resize: str = "shortest",
    interpolation: str = "bicubic",
) -> NDArray[np.float32]:
    """Pixels [3, size, size], float32, contiguous: resized, cropped, normalised.

    image: anything that load_image takes.
    mean, std: of each of R, G, B, where 1.0 is white.
    resize: "shortest" scales the shorter side to size and crops the centre; "squash" scales both
        sides to size, as some open_clip checkpoints want.
    interpolation: "bicubic" or "bilinear", antialiased.

    Raises what load_image raises, ImageError for an image that Pillow cannot resize or convert or
    whose aspect ratio is so extreme that the resized image would not fit in memory, and InputError
    for other arguments.
    """
    import PIL.Image

    filters = {
        "bicubic": PIL.Image.Resampling.BICUBIC,
        "bilinear": PIL.Image.Resampling.BILINEAR,
    }
    if resize not in ("shortest", "squash"):
        raise InputError(f'resize must be "shortest" or "squash", not {resize!r}')
    if interpolation not in filters:
        raise InputError(f'interpolation must be "bicubic" or "bilinear", not {interpolation!r}')
    if size < 1:
        raise InputError(f"size must be at least 1: {size}")
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"mean and std must have 3 values each: {mean}, {std}")

    image = load_image(image)
    width, height = (size, size) if resize == "squash" else _resized(image.size, size)
    left, top = round((width - size) / 2), round((height - size) / 2)  # halves go to even
    try:
        image = image.resize((width, height), filters[interpolation])
        image = image.crop((left, top, left + size, top + size)).convert("RGB")
    except Exception as error:  # its modes fail in as many ways as its plugins, see _open
        raise ImageError(f"cannot turn mode {image.mode} into RGB: {_reason(error)}") from error

    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # [3, size, size]
    pixels /= np.float32(255)
    pixels -= np.asarray(mean, np.float32)[:, None, None]
    pixels /= np.asarray(std, np.float32)[:, None, None]
    return pixels


def _resized(old: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) with the shorter side scaled to size, the longer one rounded down."""
    width, height = (int(size * side / min(old)) for side in old)
    if width * height > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"a {old[0]} x {old[1]} image is too elongated: resized for the crop, it would be "
            f"{width} x {height}, more than {MAX_RESIZED_PIXELS} pixels"
        )
    return width, height


def _open(file: str | io.BytesIO, name: str) -> Image:
    import PIL.Image

    try:
        image = PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image file that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise anything on a corrupt file
        raise ImageError(f"{name}: {_reason(error)}") from error
    with image:  # closes the file, keeps the pixels
        return _decode(image, name)


def _decode(image: Image, name: str) -> Image:
    try:
        image.load()
    except Exception as error:  # likewise
        raise ImageError(f"{name}: {_reason(error)}") from error
    if 0 in image.size:
        raise ImageError(f"{name}: empty, {image.width} x {image.height} pixels")
    return image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array as Pillow takes it: uint8 [H, W], [H, W, 3] or [H, W, 4]."""
    shape, hint = array.shape, ""
    has_channels = array.ndim == 3 and shape[2] in (1, 3, 4)
    if array.ndim == 3 and shape[0] in (1, 3, 4) and not has_channels:
        hint = "; it looks like [C, H, W]: transpose(1, 2, 0) it"
    elif array.ndim == 4:
        hint = "; pass the images of a batch one by one"
    elif array.dtype != np.uint8:
        hint = "; scale the values to 0 .. 255 and convert them"
    if array.dtype != np.uint8 or not (array.ndim == 2 or has_channels):
        raise ImageError(
            f"an image array must be uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
            f"not {array.dtype} {list(shape)}{hint}"
        )
    if 0 in shape:
        raise ImageError(f"an image array must not be empty, but its shape is {list(shape)}")
    return array[..., 0] if has_channels and shape[2] == 1 else array
