#!/usr/bin/env python3
"""Time a step of training beside torch's eager mode with its AdamW, and where its time goes.

    python tools/bench_training.py [--batch 32] [--rounds 5] [--write docs/training.md]

Both train openai/CLIP's architecture from the same weights on the same random pictures and texts of
5 to 20 tokens. Steps alternate, and the figure is the median. torch computes all 77 positions of a
text, as openai/CLIP does; --cut gives it texts cut to the longest of the batch, which only changes
what is padding. In bfloat16 torch runs under its autocast. --cpu-time is for a machine that others
use, with one thread. A profiled step, on its own, gives the milliseconds of each op of ours. The
floor is what the matrix products and the heads' would take at the rate of NumPy's own product of
2048 x 2048 matrices, timed in the same rounds, and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_peers import processor
from parity import import_openai_clip, write_or_print
from threadpoolctl import threadpool_limits

import npclip
from npclip.config import ARCHITECTURES, Config
from npclip.training import AdamW, State, initialize, ops, step, train_step

OPS = (
    "linear", "linear_backward", "linear_weight_backward", "activation", "activation_backward",
    "layer_norm", "layer_norm_backward", "attention", "attention_backward", "attention_pool",
    "attention_pool_backward", "patchify", "embed_patches", "embed_patches_backward",
    "embed_tokens", "embed_tokens_backward", "take", "take_backward",
)  # fmt: skip
OTHERS = ("contrastive", "flatten", "global_norm")  # of step.py
VITS = [name for name in ARCHITECTURES if name.startswith("ViT")]
CUBE = 2048  # the floor's matrices
START, END = "<!-- speed -->\n", "<!-- /speed -->\n"
NAMES = {"npclip": "npclip", "torch": "torch eager, its AdamW"}
PAUSE = 0.2  # seconds in which threads that spin while they wait fall asleep


def random_batch(config: Config, size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 images, and texts whose largest id ends them."""
    rng = np.random.default_rng(0)
    side = config.image_resolution
    images = rng.standard_normal((size, 3, side, side), dtype=np.float32)
    ids = np.zeros((size, config.context_length), np.int64)
    for row, words in zip(ids, rng.integers(3, 19, size), strict=True):
        end = config.vocab_size - 1
        row[0], row[1 : words + 1], row[words + 1] = end - 1, rng.integers(0, end - 1, words), end
    return images, ids


def step_flops(config: Config, ids: np.ndarray) -> float:
    """Of the products of a step: a backward has two for each of the forward, but for the patches'
    own gradient; of the last block only one row a sequence goes on after the keys and values."""
    c, lengths = config, ids.argmax(-1) + 1
    image = tower_flops(c.vision_width, c.vision_layers, [c.grid**2 + 1] * len(ids), c.embed_dim)
    text = tower_flops(c.transformer_width, c.transformer_layers, lengths.tolist(), c.embed_dim)
    patches = 2 * len(ids) * c.grid**2 * 3 * c.vision_patch_size**2 * c.vision_width
    return 3 * (image + text) + 2 * patches


def tower_flops(width: int, layers: int, lengths: list[int], embed_dim: int) -> float:
    """Of a forward on sequences of these lengths, without what embeds their tokens."""
    tokens, heads = sum(lengths), 4 * width * sum(n * n for n in lengths)
    rows = len(lengths)
    last = 4 * tokens * width**2 + 4 * width * tokens + 20 * rows * width**2
    return (layers - 1) * (24 * tokens * width**2 + heads) + last + 2 * rows * width * embed_dim


def torch_step(
    config: Config, params: dict[str, np.ndarray], images: np.ndarray, ids: np.ndarray, cut: bool
) -> Callable[[str], float]:
    """A step of openai/CLIP's model in torch, in a dtype: forward, backward, AdamW."""
    import torch
    from torch.nn.functional import cross_entropy

    c = config
    vision = c.embed_dim, c.image_resolution, c.vision_layers, c.vision_width, c.vision_patch_size
    length = int(ids.argmax(-1).max()) + 1 if cut else c.context_length
    text = length, c.vocab_size, c.transformer_width, c.transformer_heads, c.transformer_layers
    model = import_openai_clip().model.CLIP(*vision, *text)
    state = {k: torch.from_numpy(x.copy()) for k, x in params.items()}
    state["positional_embedding"] = state["positional_embedding"][:length].clone()
    model.load_state_dict(state)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    pixels, tokens = torch.from_numpy(images), torch.from_numpy(ids[:, :length])
    own = torch.arange(len(images))

    def run(dtype: str) -> float:
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            by_image, by_text = model(pixels, tokens)
            loss = (cross_entropy(by_image, own) + cross_entropy(by_text, own)) / 2
        loss.backward()
        adam.step()
        return loss.item()

    return run


def seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of one call."""
    start = clock()
    function()
    return clock() - start


def profile(run: Callable[[], Any], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of one step by op; linear_backward without the part that has its own row."""
    spent: dict[str, float] = defaultdict(float)
    originals = {(ops, name): getattr(ops, name) for name in OPS}
    originals |= {(step, name): getattr(step, name) for name in OTHERS}
    inside: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            start = clock()
            result = function(*args, **kwargs)
            whole = clock() - start
            spent[name] += whole - inside.pop()
            if inside:
                inside[-1] += whole
            return result

        return call

    update = AdamW.update
    try:
        for (module, name), function in originals.items():
            setattr(module, name, timed(name, function))
        AdamW.update = timed("AdamW.update", update)  # type: ignore[method-assign]
        whole = seconds(run, clock)
    finally:
        AdamW.update = update  # type: ignore[method-assign]
        for (module, name), function in originals.items():
            setattr(module, name, function)
    spent["the rest"] = whole - sum(spent.values())
    return spent


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="file with the two marker lines")
    parser.add_argument("--model", default="ViT-B/32", choices=VITS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cut", action="store_true", help="texts for torch without common padding")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, not elapsed time")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    npclip.set_num_threads(args.threads)
    threadpool_limits(args.threads, "blas")
    config = ARCHITECTURES[args.model]
    params, data = initialize(config), random_batch(config, args.batch)
    state, optimizer = State.start(params), AdamW(steps=1000, learning_rate=1e-5)
    dtypes = "float32", "bfloat16"
    steps: dict[tuple[str, str], Callable[[], Any]] = {
        ("npclip", dtype): partial(train_step, state, *data, config, optimizer, dtype=dtype)
        for dtype in dtypes
    }
    if not args.no_torch:
        import torch

        torch.set_num_threads(args.threads)
        torchs = torch_step(config, params, *data, args.cut)
        steps |= {("torch", dtype): partial(torchs, dtype) for dtype in dtypes}
    cube = np.random.default_rng(0).standard_normal((CUBE, CUBE), np.float32)
    steps["product", "float32"] = lambda: cube @ cube
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):  # the first, which warms up, does not count
        for name, run in steps.items():
            time.sleep(PAUSE)
            if (spent := seconds(run, clock)) and round_:
                times[name].append(spent)
    medians = {name: statistics.median(found) for name, found in times.items()}
    spent_in = {dtype: profile(steps["npclip", dtype], clock) for dtype in dtypes}
    text = report(args, medians, step_flops(config, data[1]), spent_in)
    write_or_print(args.write, text, START, END)


def report(
    args: argparse.Namespace,
    medians: dict[tuple[str, str], float],
    flops: float,
    spent_in: dict[str, dict[str, float]],
) -> str:
    """Two Markdown tables: npclip beside torch and the floor, and where its own time goes."""
    rate = 2 * CUBE**3 / medians.pop(("product", "float32"))
    what = "CPU time" if args.cpu_time else "elapsed"
    lines = [
        f"A step of {args.model}, batch {args.batch}, {args.threads} threads of {processor()}; "
        f"{what}, median of {args.rounds} interleaved rounds; in brackets, times npclip's.\n",
        "| | float32 | bfloat16 |",
        "|---|---|---|",
    ]
    for who, name in NAMES.items():
        if (who, "float32") in medians:
            cells = []
            for dtype in spent_in:
                ratio = medians[who, dtype] / medians["npclip", dtype]
                suffix = "" if who == "npclip" else f" ({ratio:.2f}x)"
                cells.append(f"{medians[who, dtype]:.2f} s{suffix}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    floor = flops / rate
    ratio = floor / medians["npclip", "float32"]
    about = f"floor: {flops / 1e9:,.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s"
    lines.append(f"| {about} | {floor:.2f} s ({ratio:.2f}x) | |")
    lines += ["\n| milliseconds of npclip's step | float32 | bfloat16 |", "|---|---|---|"]
    for name in sorted(spent_in["float32"], key=lambda name: -spent_in["float32"][name]):
        cells = [f"{1e3 * spent.get(name, 0):,.0f}" for spent in spent_in.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
