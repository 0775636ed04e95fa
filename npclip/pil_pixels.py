"""The pixels of a PIL image where they lie, without a copy: by Arrow's C data interface.

https://arrow.apache.org/docs/format/CDataInterface.html
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


class _ArrowArray(ctypes.Structure):
    """An image's: one list of 4 bytes per pixel, whose bytes are buffer 1 of child 0."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset")),
    *((name, ctypes.c_int64) for name in ("n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


class _Memory:
    """What NumPy makes an array of; the array keeps owner alive."""

    def __init__(self, address: int, shape: tuple[int, ...], owner: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": shape,
            "data": (address, True),  # read-only
        }
        self.owner = owner


def are_exported(image: Image) -> bool:
    """Whether view may be tried: an RGB image of Pillow 11.3 or later, with ordinary memory.

    Pillow 11.2 never frees what it exported. Others crash on exporting what Image.fromarrow made,
    which is read-only, or know nothing of the gaps that PILLOW_ALIGNMENT leaves between rows.
    """
    import PIL
    from PIL import _imaging

    return (
        image.mode == "RGB"
        and [int(number) for number in PIL.__version__.split(".")[:2]] >= [11, 3]
        and not image.im.readonly
        and _imaging.get_alignment() == 1
    )


def view(image: Image) -> NDArray[np.uint8] | None:
    """uint8 [H, W, 4], read-only, the last channel unused; None if it lies in several blocks.

    Pillow divides what is larger than 16 MiB into blocks of whole rows. The array keeps the memory
    alive. are_exported(image) must hold.
    """
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    array = _ArrowArray.from_address(_pointer_in(capsule))
    pixels = array.children[0].contents if array.n_children == 1 else None
    if pixels is None or pixels.length != 4 * image.width * image.height:
        return None
    return np.asarray(_Memory(pixels.buffers[1], (image.height, image.width, 4), capsule))


def _pointer_in(capsule: object) -> int:
    # A prototype of its own: ctypes.pythonapi's functions are shared with other libraries.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    return prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"arrow_array")
