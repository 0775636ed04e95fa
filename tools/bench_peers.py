#!/usr/bin/env python3
"""Time npclip beside its peers on this CPU: the same random weights, the same inputs, one run.

    python tools/bench_peers.py --model ViT-B/32 --what image --batches 1,8,32
    python tools/bench_peers.py --write README.md

Rounds are interleaved over the peers, so that a drift of the machine hits all alike; the figure is
the median. Every output is compared with torch's in float32 (smallest cosine). Peers that are not
installed are left out (tests/parity/requirements*.txt). With --write, the README's table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from parity import import_openai_clip, write_or_print
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip import cpu_library
from npclip.config import ARCHITECTURES, Metadata

Encoder = Callable[[NDArray], NDArray]
PAUSE = 0.2  # seconds in which the last peer's threads, which spin while they wait, fall asleep
START, END = "<!-- speed -->\n", "<!-- /speed -->\n"
FLOAT32 = ("npclip", "torch", "torch-compile", "onnxruntime", "openvino", "clippie")
BFLOAT16 = ("npclip-bfloat16", "torch-compile-bfloat16", "openvino-bfloat16", "onnxruntime-int8")
README_CASES = [
    (FLOAT32, "ViT-B/32", "image", (1, 8, 32)),
    (FLOAT32, "ViT-B/32", "text", (1, 32)),
    (BFLOAT16, "ViT-B/32", "image", (1, 8, 32)),
    (BFLOAT16, "ViT-B/32", "text", (1, 32)),
    (BFLOAT16, "ViT-L/14", "image", (8,)),
    (BFLOAT16, "RN50", "image", (1, 32)),
]


class Model:
    """One tower of a random model, for every peer to build its encoder from."""

    def __init__(self, name: str, what: str, folder: Path, threads: int) -> None:
        """Make the weights, write them for npclip, and build openai/CLIP's module from them."""
        import torch

        self.config, self.what, self.folder, self.threads = (
            ARCHITECTURES[name],
            what,
            folder,
            threads,
        )
        self.slug = name.replace("/", "-").replace("@", "-")
        tensors = random_tensors(self.config)
        self.checkpoint = folder / f"{self.slug}.safetensors"
        save_file(tensors, self.checkpoint, Metadata(activation="quick_gelu").to_strings())
        state = {key: torch.from_numpy(value) for key, value in tensors.items()}
        self.clip = import_openai_clip().model.build_model(state).float().eval()
        self.clip.requires_grad_(False)
        self.tower = self.clip.visual if what == "image" else _text_tower(self.clip)

    def inputs(self, batch: int) -> NDArray:
        """Pixels [B, 3, R, R], or ids [B, 77] of captions of 5 to 19 tokens."""
        rng, size = np.random.default_rng(batch), self.config.image_resolution
        if self.what == "image":
            return rng.standard_normal((batch, 3, size, size), dtype=np.float32)
        ids = np.zeros((batch, 77), np.int64)
        for row in ids:
            length = int(rng.integers(4, 19))
            row[0], row[length] = npclip.tokenizer.SOT, npclip.tokenizer.EOT
            row[1:length] = rng.integers(1, 40000, length - 1)
        return ids

    def onnx(self) -> Path:
        """The tower as an ONNX file with a free batch size."""
        import torch

        path = self.folder / f"{self.slug}-{self.what}.onnx"
        if not path.exists():
            axes = {"x": {0: "batch"}, "y": {0: "batch"}}
            example = (torch.from_numpy(self.inputs(2)),)
            names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
            torch.onnx.export(self.tower, example, path, opset_version=17, dynamo=False, **names)
        return path


def _text_tower(clip):
    import torch

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = clip

        def forward(self, ids):
            return self.clip.encode_text(ids)

    return Text().eval()


def build_npclip(model: Model, dtype: str) -> Encoder:
    """This project."""
    clip = npclip.load(model.checkpoint, dtype=dtype)
    return clip.encode_image if model.what == "image" else clip.encode_text


def build_torch(model: Model) -> Encoder:
    """openai/CLIP's module, eager, float32."""
    import torch

    return lambda x: model.tower(torch.from_numpy(x)).numpy()


def build_torch_compile(model: Model, dtype: str) -> Encoder:
    """The same through torch.compile, one graph a shape; LayerNorm stays in float32, as CLIP's."""
    import torch

    tower = copy.deepcopy(model.tower).to(getattr(torch, dtype))
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
    compiled = torch.compile(tower, dynamic=False)

    def encode(x: NDArray) -> NDArray:
        tensor = torch.from_numpy(x)
        pixels = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        return compiled(pixels).float().numpy()

    return encode


def build_onnxruntime(model: Model, int8: bool) -> Encoder:
    """onnxruntime, float32, or with weights and activations quantised to int8 dynamically."""
    import onnxruntime

    path = model.onnx()
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        path = path.with_suffix(".int8.onnx")
        quantize_dynamic(model.onnx(), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def build_openvino(model: Model, precision: str) -> Encoder:
    """OpenVINO; precision "f32" or "bf16"."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": model.threads,
    }
    compiled = openvino.Core().compile_model(model.onnx(), "CPU", options)
    return lambda x: compiled(x)[0]


def build_clippie(model: Model) -> Encoder:
    """clippie, the other CLIP on NumPy; its own image scaling and tokenizer are left out."""
    import clippie.model
    from clippie.scripts.convert_weights_file import extract_weights

    weights = extract_weights(model.clip)
    clippie.model.centre_crop_and_resize = lambda image, _: image
    clippie.model.image_to_scaled_array = lambda image: image
    clippie.model.tokeniser.encode = lambda tokens: tokens
    if model.what == "image":
        return lambda x: clippie.model.encode_image(
            [image.transpose(1, 2, 0) for image in x], weights.image_encoder
        )
    return lambda ids: clippie.model.encode_text(
        [row[1 : row.argmax()].tolist() for row in ids], weights.text_encoder
    )


PEERS: dict[str, tuple[str, Callable[[Model], Encoder]]] = {  # name -> module needed, builder
    "npclip": ("npclip", partial(build_npclip, dtype="float32")),
    "npclip-bfloat16": ("npclip", partial(build_npclip, dtype="bfloat16")),
    "torch": ("torch", build_torch),
    "torch-compile": ("torch", partial(build_torch_compile, dtype="float32")),
    "torch-compile-bfloat16": ("torch", partial(build_torch_compile, dtype="bfloat16")),
    "onnxruntime": ("onnxruntime", partial(build_onnxruntime, int8=False)),
    "onnxruntime-int8": ("onnxruntime", partial(build_onnxruntime, int8=True)),
    "openvino": ("openvino", partial(build_openvino, precision="f32")),
    "openvino-bfloat16": ("openvino", partial(build_openvino, precision="bf16")),
    "clippie": ("clippie", build_clippie),
}


def bench(
    name: str,
    what: str,
    batches: tuple[int, ...],
    peers: tuple[str, ...],
    rounds: int,
    threads: int,
) -> dict[int, dict[str, tuple[float, float]]]:
    """batch -> peer -> (median seconds, smallest cosine with torch float32)."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(name, what, Path(folder), threads)
        reference = build_torch(model)
        encoders = {}
        for peer in peers:
            module, build = PEERS[peer]
            if importlib.util.find_spec(module) is None:
                print(f"{peer}: not installed, left out", file=sys.stderr)
                continue
            encoders[peer] = build(model)
        return {b: _bench_batch(encoders, model.inputs(b), reference, rounds) for b in batches}


def _bench_batch(
    encoders: dict[str, Encoder], x: NDArray, reference: Encoder, rounds: int
) -> dict[str, tuple[float, float]]:
    expected = reference(x)
    cosines = {peer: _cosine(encode(x), expected) for peer, encode in encoders.items()}
    times: dict[str, list[float]] = {peer: [] for peer in encoders}
    repeats = 3 if len(x) <= 2 else 1
    for _ in range(rounds):
        for peer, encode in encoders.items():
            time.sleep(PAUSE)
            if repeats > 1:
                encode(x)  # a short case starts with awake threads
            start = time.perf_counter()
            for _ in range(repeats):
                encode(x)
            times[peer].append((time.perf_counter() - start) / repeats)
    return {peer: (float(np.median(t)), cosines[peer]) for peer, t in times.items()}


def _cosine(a: NDArray, b: NDArray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / norms).min())


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


START_UP = """
import sys, time
start = time.perf_counter()
import npclip
imported = time.perf_counter()
npclip.load(sys.argv[1])
print(imported - start, time.perf_counter() - imported)
"""


def start_up(rounds: int) -> str:
    """How long a new process takes to import npclip, and to load ViT-B/32 from its file."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        tensors = random_tensors(ARCHITECTURES["ViT-B/32"])
        save_file(tensors, checkpoint, Metadata(activation="quick_gelu").to_strings())
        command = [sys.executable, "-c", START_UP, checkpoint]
        times = [subprocess.check_output(command, text=True).split() for _ in range(rounds)]
    imported, loaded = np.median(np.array(times, float), axis=0)
    return (
        f"In a new process, its files in the page cache: `import npclip` {imported:.2f} s, "
        f"`npclip.load` of a converted ViT-B/32 {loaded:.2f} s.\n"
    )


def tables(cases: list, rounds: int, threads: int) -> str:
    """The Markdown tables of all cases: milliseconds a batch, and how many times npclip's."""
    text = ""
    for peers in dict.fromkeys(case[0] for case in cases):
        text += "| | " + " | ".join(peers) + " |\n" + "|---" * (len(peers) + 1) + "|\n"
        for _, name, what, batches in (case for case in cases if case[0] == peers):
            for batch, results in bench(name, what, batches, peers, rounds, threads).items():
                text += _row(f"{name} {what}, batch {batch}", batch, peers, results)
        text += "\n"
    versions = [f"npclip {npclip.__version__}", f"NumPy {np.__version__}"]
    for module in ("torch", "onnxruntime", "openvino"):
        if importlib.util.find_spec(module):
            versions.append(f"{module} {importlib.import_module(module).__version__}")
    isa = "NumPy" if cpu_library.why_unavailable() else f"kernels for {cpu_library.isas()[0]}"
    return (
        f"Milliseconds a batch, {threads} threads of {processor()} ({isa}), median of {rounds} "
        f"interleaved rounds; in brackets, times npclip's. {', '.join(versions)}.\n\n{text}"
    )


def _row(title: str, batch: int, peers: tuple[str, ...], results: dict) -> str:
    own, cells = results[peers[0]][0], []
    for peer in peers:
        seconds, cosine = results.get(peer, (float("nan"), float("nan")))
        ratio = "" if peer == peers[0] else f" ({seconds / own:.2f}x)"
        cells.append("-" if np.isnan(seconds) else f"{seconds * 1e3:.1f}{ratio}")
        print(
            f"{title:30s} {peer:22s} {seconds * 1e3:9.2f} ms {batch / seconds:8.1f}/s  "
            f"cosine {cosine:.7f}",
            file=sys.stderr,
            flush=True,
        )
    return f"| {title} | " + " | ".join(cells) + " |\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=ARCHITECTURES, default="ViT-B/32", metavar="MODEL")
    parser.add_argument("--what", choices=("image", "text"), default="image")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--peers", default=",".join(FLOAT32), help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the README's cases, into FILE")
    args = parser.parse_args()
    peers = tuple(args.peers.split(","))
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peers {unknown}; known: {', '.join(PEERS)}")
    import torch

    warnings.filterwarnings("ignore")  # the exporters' advice
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    batches = tuple(int(b) for b in args.batches.split(","))
    npclip.set_num_threads(args.threads)
    cases = README_CASES if args.write else [(peers, args.model, args.what, batches)]
    text = tables(cases, args.rounds, args.threads)
    if args.write:
        text += "\n" + start_up(args.rounds)
    write_or_print(args.write, text, START, END)


if __name__ == "__main__":
    main()
