"""Images -> the pixels that the image tower takes, bit-identical to openai/CLIP's preprocessing.

resize -> centre crop -> RGB -> float32 [3, size, size] -> / 255 -> - mean -> / std

The conversion to RGB comes after the resize: Pillow resizes palettes by nearest neighbour, and
weights pixels by their alpha, so converting first changes every such image. EXIF rotation is
ignored. All as in https://github.com/openai/CLIP/blob/main/clip/clip.py (_transform).

RGB takes a C kernel where its result is Pillow's to the bit (_by_kernel), all else Pillow.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import cpu, cpu_library, pil_pixels
from .errors import ImageError, InputError, InputTypeError
from .kernels import reference_resize

if TYPE_CHECKING:
    from PIL.Image import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0 .. 1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED_PIXELS = 178_956_970  # before the crop; Pillow refuses to open larger images
MAX_KERNEL_SIDE = 16384  # of an image; up to there the kernel is tested
BLOCK_BYTES = 16 << 20  # Pillow divides larger images into blocks of that size

Tables: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32]]  # of axis_tables
ImageSource = Any  # str | os.PathLike[str] | bytes | bytearray | PIL.Image.Image | uint8 array


def load_image(
    source: ImageSource, max_pixels: int | None = None, reduce_to: int | None = None
) -> Image:
    """A fully decoded PIL image, in the mode that it is stored in.

    source: a path, the bytes of an image file, a PIL image, or a uint8 array: RGB [H, W, 3],
        RGBA [H, W, 4], or grey [H, W] or [H, W, 1].
    max_pixels, reduce_to: of files. Larger ones are not decoded. A JPEG is decoded at 1/2, 1/4 or
        1/8 of its size where its sides stay at least reduce_to: close to, not equal to, what
        resizing all of it gives.

    Raises ImageError, saying why, if it cannot be read or decoded to its end, is empty, has more
    than max_pixels, or is an array of another dtype or shape; InputTypeError for any other type.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _decode(source, "PIL image")
    if isinstance(source, np.ndarray):
        return PIL.Image.fromarray(_check_array(source))
    if isinstance(source, (bytes, bytearray)):
        name = f"image of {len(source)} bytes"
        return _open(io.BytesIO(source), name, max_pixels, reduce_to)
    if isinstance(source, (str, os.PathLike)):
        return _open(os.fspath(source), os.fspath(source), max_pixels, reduce_to)
    raise InputTypeError(
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
    if resize not in ("shortest", "squash"):
        raise InputError(f'resize must be "shortest" or "squash", not {resize!r}')
    if interpolation not in ("bicubic", "bilinear"):
        raise InputError(f'interpolation must be "bicubic" or "bilinear", not {interpolation!r}')
    if size < 1:
        raise InputError(f"size must be at least 1: {size}")
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"mean and std must have 3 values each: {mean}, {std}")

    image = _check_array(image) if isinstance(image, np.ndarray) else load_image(image)
    old = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size  # width, height
    new, corner = geometry(old, size, resize)
    if _is_for_the_kernel(image, old, new):
        x, y = (
            reference_resize.axis_tables(*lengths, size, interpolation)
            for lengths in zip(old, new, corner, strict=True)
        )
        if (pixels := _by_kernel(image, x, y, _table(tuple(mean), tuple(std)))) is not None:
            return pixels
    levels = _by_pillow(load_image(image), new, corner, size, interpolation)
    return normalized(levels, mean, std)


def normalized(
    levels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:  # [..., H, W, 3] -> [..., 3, H, W]
    """The last step of preprocess(), of pixels that have their size."""
    pixels = np.moveaxis(levels, -1, -3).astype(np.float32, order="C")
    pixels /= np.float32(255)
    pixels -= np.asarray(mean, np.float32)[:, None, None]
    pixels /= np.asarray(std, np.float32)[:, None, None]
    return pixels


def geometry(
    old: tuple[int, int], size: int, resize: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What an image of old (width, height) is resized to, and where the crop of size begins."""
    new = (size, size) if resize == "squash" else _resized(old, size)
    return new, (round((new[0] - size) / 2), round((new[1] - size) / 2))  # halves go to even


def _by_pillow(
    image: Image, new: tuple[int, int], corner: tuple[int, int], size: int, interpolation: str
) -> NDArray[np.uint8]:  # [size, size, 3]
    import PIL.Image

    left, top = corner
    try:
        image = image.resize(new, PIL.Image.Resampling[interpolation.upper()])
        image = image.crop((left, top, left + size, top + size)).convert("RGB")
    except Exception as error:  # its modes fail in as many ways as its plugins, see _open
        raise ImageError(f"cannot turn mode {image.mode} into RGB: {_reason(error)}") from error
    return np.asarray(image)


def _is_for_the_kernel(image: Any, old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether the kernel takes this, and what it gives is what Pillow gives, of any version."""
    if isinstance(image, np.ndarray):
        is_rgb = image.ndim == 3 and image.shape[2] == 3
    else:
        is_rgb = pil_pixels.are_exported(image)
    is_same = max(old) <= MAX_KERNEL_SIDE and reference_resize.is_x_first(old, new)
    return is_rgb and is_same and _has_kernels()


def _by_kernel(
    image: Any, x: Tables, y: Tables, table: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """float32 [3, size, size] from axis_tables; None where the pixels cannot be read in place."""
    (x_first, x_packed), (y_first, y_packed) = x, y
    out = np.empty((3, len(y_first), len(y_first)), np.float32)
    for begin, end, strip in _strips(image, x, y):
        if strip is None:
            return None
        x_tables, y_tables = (x_first - x_first[0], x_packed), (y_first - y_first[begin], y_packed)
        cpu.resize(strip, x_tables, y_tables, begin, end, table, out)
    return out


def _strips(image: Any, x: Tables, y: Tables) -> Iterator[tuple[int, int, Any]]:
    """begin, end, and what the outputs begin .. end read, from its first row and column on.

    An image is one strip, read where it lies. One that Pillow keeps in several blocks is copied,
    some rows at a time, into images of one block; None stands for what does not fit in one.
    """
    (x_first, x_packed), (y_first, y_packed) = x, y
    left, pairs = 2 * int(x_first[0]), y_packed.shape[1]
    is_array = isinstance(image, np.ndarray)
    if (pixels := _with_whole_rows(image) if is_array else pil_pixels.view(image)) is not None:
        yield 0, len(y_first), pixels[2 * y_first[0] :, left:]
        return
    right = min(image.width, 2 * int(x_first[-1] + x_packed.shape[1]))
    block_rows = BLOCK_BYTES // (4 * (right - left))
    if 2 * pairs > block_rows:
        yield 0, 1, None
        return
    rows = min(8 * 2 * pairs, block_rows)  # neighbours share 2 pairs: an eighth is copied twice
    begin = 0
    while begin < len(y_first):
        top = 2 * int(y_first[begin])
        end = int(np.searchsorted(2 * (y_first + pairs), top + rows, "right"))
        bottom = min(image.height, 2 * int(y_first[end - 1] + pairs))
        yield begin, end, _copied(image, (left, top, right, bottom))
        begin = end


def _copied(image: Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
    import PIL.Image

    try:
        return pil_pixels.view(image.crop(box))
    except PIL.Image.DecompressionBombError:  # MAX_IMAGE_PIXELS is low, and meant for files
        return None


def _with_whole_rows(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array, or a copy, whose rows are contiguous; the rows themselves may lie anywhere."""
    return array if array.strides[1:] == (3, 1) else np.ascontiguousarray(array)


@functools.cache
def _has_kernels() -> bool:
    return cpu_library.why_unavailable() is None


@functools.lru_cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    return reference_resize.normalize_table(mean, std)


def _resized(old: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) with the shorter side scaled to size, the longer one rounded down."""
    width, height = (int(size * side / min(old)) for side in old)
    if width * height > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"a {old[0]} x {old[1]} image is too elongated: resized for the crop, it would be "
            f"{width} x {height}, more than {MAX_RESIZED_PIXELS} pixels"
        )
    return width, height


def _open(
    file: str | io.BytesIO, name: str, max_pixels: int | None, reduce_to: int | None
) -> Image:
    import PIL.Image

    try:
        image = PIL.Image.open(file)
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image file that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise anything on a corrupt file
        raise ImageError(f"{name}: {_reason(error)}") from error
    with image:  # closes the file, keeps the pixels
        if image.format == "EPS":
            raise ImageError(f"{name}: EPS is a program, which Pillow has Ghostscript run")
        if max_pixels is not None and image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height}"
            raise ImageError(f"{name}: {size} pixels are more than {max_pixels}")
        return _decode(image, name, reduce_to)


def _decode(image: Image, name: str, reduce_to: int | None = None) -> Image:
    try:
        if reduce_to is not None:
            image.draft(None, (reduce_to, reduce_to))
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
