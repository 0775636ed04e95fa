#!/usr/bin/env python3
"""Write tests/data/golden_*.npz: small models with the outputs of openai/CLIP's code in float64.

    python tools/make_goldens.py          (needs what tools/parity.py needs)

A file holds the weights as stored ("weights/<name>"), the inputs, and the features for each
activation, so that the tests that read it need no torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from parity import import_openai_clip
from random_checkpoint import random_tensors

from npclip.config import ARCHITECTURES, Config

DATA = Path(__file__).parents[1] / "tests" / "data"
TEXT = {"vocab_size": 100, "transformer_width": 64, "transformer_heads": 1,
        "transformer_layers": 2, "transformer_mlp": 256}  # fmt: skip
MODELS: dict[str, Config] = {
    "vit": dataclasses.replace(
        ARCHITECTURES["ViT-B/32"], embed_dim=48, image_resolution=64, vision_layers=2,
        vision_width=128, vision_patch_size=16, vision_heads=2, vision_mlp=512, **TEXT,
    ),
    "resnet": dataclasses.replace(
        ARCHITECTURES["RN50"], embed_dim=48, image_resolution=96, vision_layers=(1, 2, 1, 1),
        vision_width=8, vision_heads=4, vision_mlp=32, **TEXT,
    ),
}  # fmt: skip


def golden(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Weights, inputs and the features that openai/CLIP computes from them."""
    import torch

    openai = import_openai_clip().model
    openai.LayerNorm.forward = torch.nn.LayerNorm.forward  # its own casts to float32
    tensors = random_tensors(config, seed, outliers=True)
    rng = np.random.default_rng(seed)
    size, end = config.image_resolution, config.vocab_size - 1
    images = rng.standard_normal((3, 3, size, size), dtype=np.float32)
    ids = np.zeros((5, config.context_length), np.int32)
    for row, length in zip(ids, (0, 1, 7, 30, 75), strict=True):
        row[0], row[length + 1] = end - 1, end
        row[1 : length + 1] = rng.integers(0, end - 1, length)
    arrays = {f"weights/{name}": tensor for name, tensor in tensors.items()}
    arrays |= {"images": images, "ids": ids}
    for activation in ("quick_gelu", "gelu"):
        state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        model = openai.build_model(state).double().eval()
        if activation == "gelu":
            for block in model.modules():
                if hasattr(block, "c_fc"):
                    block.gelu = torch.nn.GELU()
        with torch.no_grad():
            image = model.encode_image(torch.from_numpy(images).double())
            text = model.encode_text(torch.from_numpy(ids))
        arrays |= {f"{activation}/image": image.numpy(), f"{activation}/text": text.numpy()}
    return arrays


def main() -> None:
    """Write every golden file."""
    for seed, (name, config) in enumerate(MODELS.items()):
        path = DATA / f"golden_{name}.npz"
        np.savez_compressed(path, **golden(config, seed))
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
