#!/usr/bin/env python3
"""Time picture files to embeddings: npclip beside torch.compile with torchvision's transforms.

    python tools/bench_files.py [--model ViT-B/32] [--dtype bfloat16] [--write README.md]

Both read the same JPEGs (640x480 to 1920x1080) and decode in as many threads as they encode with.
Rounds are interleaved; the figure is the median.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_peers import Model, build_torch_compile
from numpy.typing import NDArray
from parity import import_openai_clip, replace_between_markers
from PIL import Image

import npclip
from npclip.config import ARCHITECTURES

SIZES = [(640, 480), (800, 600), (1024, 768), (1280, 720), (1920, 1080)]
START, END = "<!-- files -->\n", "<!-- /files -->\n"
BATCH = 32


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of smooth random pictures with some noise, about as large as photographs' files."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        paths.append(folder / f"{i:04}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=85)
    return paths


def torch_encoder(model: Model, dtype: str) -> Callable[[list[Path]], NDArray]:
    """torchvision's transforms in threads, then torch.compile on batches."""
    encode = build_torch_compile(model, dtype)
    transform = import_openai_clip().clip._transform(model.config.image_resolution)

    def load(path: Path) -> NDArray:
        with Image.open(path) as image:
            return transform(image).numpy()

    def run(paths: list[Path]) -> NDArray:
        with ThreadPoolExecutor(model.threads) as pool:
            batches = (paths[i : i + BATCH] for i in range(0, len(paths), BATCH))
            return np.concatenate([encode(np.stack(list(pool.map(load, b)))) for b in batches])

    return run


def bench(name: str, dtype: str, files: int, rounds: int, threads: int) -> str:
    """One sentence with both rates."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), files)
        model = Model(name, "image", Path(folder), threads)
        clip = npclip.load(model.checkpoint, dtype=dtype)
        encoders = {"npclip": clip.encode_image, "torch": torch_encoder(model, dtype)}
        times: dict[str, list[float]] = {peer: [] for peer in encoders}
        outputs = {peer: encode(paths) for peer, encode in encoders.items()}  # also warms up
        for _ in range(rounds):
            for peer, encode in encoders.items():
                start = time.perf_counter()
                encode(paths)
                times[peer].append(time.perf_counter() - start)
                print(f"{peer:8s} {files / times[peer][-1]:7.1f} files/s", file=sys.stderr)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in outputs.values())
    own, peer = (files / float(np.median(t)) for t in times.values())
    return (
        f"{files} JPEGs (640x480 to 1920x1080) to {name} embeddings in {dtype}, {threads} threads, "
        f"files in: {own:.1f} a second, torch.compile with torchvision's transforms {peer:.1f} "
        f"({own / peer:.2f}x; smallest cosine {(a * b).sum(-1).min():.5f}).\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="ViT-B/32", metavar="MODEL")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the result into this file")
    args = parser.parse_args()
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    npclip.set_num_threads(args.threads)
    text = bench(args.model, args.dtype, args.files, args.rounds, args.threads)
    if args.write:
        replace_between_markers(args.write, text, START, END)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
