#!/usr/bin/env python3
"""Compare npclip with openai/CLIP's own code in PyTorch, at full size, for every architecture.

    pip install -r tests/parity/requirements.txt
    pip install --no-deps -r tests/parity/requirements-no-deps.txt
    python tools/parity.py [MODEL...] [--write README.md]

Each model has random weights in the official shapes and dtypes; "outliers" are the same with a few
LayerNorm gains 20 times larger, for activations as large as a trained model's. Both sides read the
same checkpoint file and get the same picture, noise and captions. The table gives the largest
absolute difference of L2-normalised features and of logits at scale 100.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

import npclip
from npclip.config import ARCHITECTURES, Metadata

PICTURE = Path(__file__).parents[1] / "tests" / "data" / "rocket.jpg"
CAPTIONS = ["", "a photo of a rocket", "two cats asleep on a sofa, seen from above", "word " * 75]
MAX_FEATURE_DIFFERENCE = 1e-6
MAX_LOGIT_DIFFERENCE = 1e-4
START, END = "<!-- parity -->\n", "<!-- /parity -->\n"


@dataclass(frozen=True)
class Result:
    """Largest absolute differences of one model: npclip against openai/CLIP in torch float32."""

    image: float
    text: float
    logits: float

    @property
    def passed(self) -> bool:
        """Within the bounds that the project sets itself."""
        features = max(self.image, self.text)
        return features <= MAX_FEATURE_DIFFERENCE and self.logits <= MAX_LOGIT_DIFFERENCE


@functools.cache
def import_openai_clip() -> ModuleType:
    """openai/CLIP's package, also where torchvision's compiled ops do not load beside this torch.

    CLIP needs its transforms only, and those import once two of the ops are declared.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip imports pkg_resources
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # operator torchvision::nms does not exist
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.torchvision_stub = library  # declared for as long as it lives
        return importlib.import_module("clip")


def compare(name: str, outliers: bool, seed: int = 0) -> Result:
    """Run both implementations of one architecture on the same random weights and inputs."""
    import torch

    build_model = import_openai_clip().model.build_model
    config = ARCHITECTURES[name]
    tensors = random_tensors(config, seed, outliers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, Metadata(activation="quick_gelu").to_strings())
        model = npclip.load(path)
        state = {key: torch.from_numpy(value) for key, value in tensors.items()}
        openai = build_model(state).float().eval()
        images, ids = _inputs(model, seed)
        logits = model(images, ids)[0]
        features = model.encode_image(images), model.encode_text(ids)
        with torch.no_grad():
            pixels, tokens = torch.from_numpy(images), torch.from_numpy(ids)
            expected = openai.encode_image(pixels).numpy(), openai.encode_text(tokens).numpy()
            expected_logits = openai(pixels, tokens)[0].numpy()
        del model  # unmaps the file, which some systems do not delete otherwise
    image, text = (
        np.abs(_unit(a) - _unit(b)).max() for a, b in zip(features, expected, strict=True)
    )
    return Result(float(image), float(text), float(np.abs(logits - expected_logits).max()))


@dataclass(frozen=True)
class Cosines:
    """Smallest cosines with torch float32: of npclip in bfloat16, and of torch's own bfloat16."""

    npclip: float
    torch: float


def compare_bfloat16(name: str, outliers: bool, seed: int = 0) -> dict[str, Cosines]:
    """{"image": ..., "text": ...} of one architecture on the same random weights and inputs."""
    import torch

    build_model = import_openai_clip().model.build_model
    tensors = random_tensors(ARCHITECTURES[name], seed, outliers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, Metadata(activation="quick_gelu").to_strings())
        model = npclip.load(path, dtype="bfloat16")
        images, ids = _inputs(model, seed)
        features = model.encode_image(images), model.encode_text(ids)
        del model
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    exact, narrow = (build_model(dict(state)).to(d).eval() for d in (torch.float, torch.bfloat16))
    for module in narrow.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()  # openai/CLIP computes it in float32, whatever the model's dtype
    with torch.no_grad():
        pixels, tokens = torch.from_numpy(images), torch.from_numpy(ids)
        expected = exact.encode_image(pixels).numpy(), exact.encode_text(tokens).numpy()
        rounded = narrow.encode_image(pixels.bfloat16()), narrow.encode_text(tokens)
    return {
        tower: Cosines(_cosine(own, wanted), _cosine(peer.float().numpy(), wanted))
        for tower, own, peer, wanted in zip(
            ("image", "text"), features, rounded, expected, strict=True
        )
    }


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float((_unit(a) * _unit(b)).sum(-1).min())


def _inputs(model: npclip.CLIP, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    size = model.visual.input_resolution
    noise = np.random.default_rng(seed).standard_normal((1, 3, size, size), dtype=np.float32)
    images = np.concatenate([model.preprocess(PICTURE)[None], noise])
    return images[:1] if size > 336 else images, npclip.tokenize(CAPTIONS)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def table(names: list[str]) -> tuple[str, bool]:
    """The Markdown table, and whether every model passed."""
    rows = [
        "| model | weights | image features | text features | logits |",
        "|---|---|---|---|---|",
    ]
    passed = True
    for name in names:
        for outliers in (False, True):
            result = compare(name, outliers)
            passed = passed and result.passed
            kind = "outliers" if outliers else "random"
            cells = f"{result.image:.1e} | {result.text:.1e} | {result.logits:.1e}"
            rows.append(f"| {name} | {kind} | {cells} |")
            print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows) + "\n", passed


def replace_between_markers(path: Path, text: str, start: str = START, end: str = END) -> None:
    """Write text between the two marker lines of a file."""
    head, _, rest = path.read_text().partition(start)
    if end not in rest:
        raise SystemExit(f"{path} has no {start.strip()} ... {end.strip()}")
    path.write_text(head + start + text + end + rest.partition(end)[2])


def write_or_print(path: Path | None, text: str, start: str = START, end: str = END) -> None:
    """What --write does, and a program without it."""
    if path:
        replace_between_markers(path, text, start, end)
    else:
        print(text, end="")


def main() -> int:
    """The command line; exit code 1 where a difference is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(ARCHITECTURES))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    args = parser.parse_args()
    if unknown := set(args.models) - set(ARCHITECTURES):
        parser.error(f"unknown model: {', '.join(unknown)}")
    text, passed = table(args.models or list(ARCHITECTURES))
    write_or_print(args.write, text)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
