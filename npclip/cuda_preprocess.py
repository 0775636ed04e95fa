"""CLIP's preprocessing on a GPU, for uint8 images that lie there: to the bits of preprocess.py."""

from __future__ import annotations

from typing import Any

from . import cuda_images
from .config import Metadata
from .cuda_device import Device
from .kernels import reference_resize
from .preprocess import geometry, preprocess

Array = Any


def normalize_table(device: Device, metadata: Metadata) -> Array:
    """float32 [3, 256] on the device: what a byte of each channel becomes."""
    return device.asarray(reference_resize.normalize_table(metadata.mean, metadata.std))


def preprocess_on_device(
    device: Device, images: Array, size: int, metadata: Metadata, table: Array
) -> Array:
    """uint8 RGB [B, H, W, 3] -> float32 [B, 3, size, size], resized, cropped and normalised.

    table: normalize_table of the metadata.
    Images that Pillow resizes in y first, and too wide ones, go through the host.
    """
    old = images.shape[2], images.shape[1]
    new, corner = geometry(old, size, metadata.resize)
    how = metadata.mean, metadata.std, metadata.resize, metadata.interpolation
    out = device.empty((len(images), 3, size, size), "f32")
    fits = max(old) <= cuda_images.MAX_COLUMNS and reference_resize.is_x_first(old, new)
    if not fits or not device.has_kernels:
        for i, image in enumerate(device.asnumpy(images)):
            out[i] = device.asarray(preprocess(image, size, *how))
        return out
    plan = cuda_images.resize_plan(old, new, corner, size, metadata.interpolation)
    launches = cuda_images.resize(
        device.asarray(images),
        plan,
        device.index(plan.x_axis),
        device.index(plan.y_axis),
        table,
        device.empty(plan.scratch_shape(len(images)), "u8"),
        out,
    )
    for launch in launches:
        device.run(launch)
    return out
