#!/usr/bin/env python3
"""Write a CLIP checkpoint with random weights in an official model's shapes, dtypes and metadata.

    python tools/random_checkpoint.py ViT-B/32 random.safetensors --seed 0

It computes what the real model computes, at the same cost, but knows nothing. Tests and benchmarks
use it, and so can you, where OpenAI's weights cannot be downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from npclip.config import ARCHITECTURES, Config, Metadata, tensor_shapes


def random_tensors(config: Config, seed: int = 0, outliers: bool = False) -> dict[str, NDArray]:
    """Random weights in openai/CLIP's names, shapes and stored dtypes, scaled as CLIP initialises.

    outliers: a few LayerNorm gains are 20 times larger, so that activations grow as large as those
    of a trained model.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = _values(rng, name, shape, config)
        if outliers and name.endswith(("ln_1.weight", "ln_2.weight")):
            values[:: len(values) // 3] *= 20
        tensors[name] = values.astype(_stored_dtype(name))
    return tensors


def _values(rng, name, shape, config) -> NDArray[np.float32]:
    noise = rng.standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if name == "logit_scale":
        return np.array(np.log(100), np.float32)
    if leaf == "running_var":
        return 1 + 0.5 * np.tanh(noise)
    if leaf == "running_mean" or leaf.endswith("bias"):
        return 0.1 * noise
    if ".bn" in name or "downsample.1" in name:
        return (0.3 if "bn3" in name else 1) + 0.1 * noise
    if ".ln_" in name or name.startswith("ln_"):
        return 1 + 0.1 * noise
    if "token_embedding" in name:
        return 0.02 * noise
    if name == "positional_embedding":
        return 0.01 * noise
    if len(shape) == 4 and not config.is_vit:
        return noise * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    if name in ("text_projection", "visual.proj") or "embedding" in name:
        width = shape[0] if "proj" in name else shape[-1]
        return noise * np.float32(width**-0.5)
    return noise * np.float32(np.prod(shape[1:]) ** -0.5)


def _stored_dtype(name: str) -> type:
    """float16 for what openai/CLIP's convert_weights casts, else float32."""
    norm = any(part.startswith(("ln_", "bn")) for part in name.split("."))
    keep = norm or "embedding" in name or name == "logit_scale" or "downsample.1" in name
    return np.float32 if keep else np.float16


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(ARCHITECTURES)
    parser.add_argument("model", choices=ARCHITECTURES, metavar="MODEL", help=names)
    parser.add_argument("out", type=Path, metavar="OUT", help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outliers", action="store_true", help="activations as large as trained")
    args = parser.parse_args()
    tensors = random_tensors(ARCHITECTURES[args.model], args.seed, args.outliers)
    source = f"random weights, seed {args.seed}"
    save_file(tensors, args.out, Metadata(activation="quick_gelu", source=source).to_strings())
    print(f"{args.out}: {args.model}, {source}")


if __name__ == "__main__":
    main()
