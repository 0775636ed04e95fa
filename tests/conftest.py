"""Shared by all tests: the repository's tools and pictures, and the small golden models."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import npclip
from npclip.config import Metadata

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
for folder in (ROOT / "tests", ROOT / "tests" / "parity"):
    sys.path.insert(0, str(folder))


@pytest.fixture
def one_blas_thread():
    """For many small products: on cores that others use, threads wait for one another far longer
    than they compute."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="session")
def pictures() -> Path:
    return ROOT / "tests" / "data"


@dataclass(frozen=True)
class Golden:
    """A small model with openai/CLIP's outputs in float64 (tools/make_goldens.py)."""

    path: Path  # its checkpoint, safetensors with metadata, QuickGELU
    arrays: dict[str, np.ndarray]

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        return {k.removeprefix("weights/"): v for k, v in self.arrays.items() if "weights/" in k}

    @cached_property
    def model(self) -> npclip.CLIP:
        return npclip.load(self.path, device="cpu")


@pytest.fixture(scope="session", params=["vit", "resnet"])
def golden(request, pictures, tmp_path_factory) -> Golden:
    with np.load(pictures / f"golden_{request.param}.npz") as file:
        arrays = dict(file)
    path = tmp_path_factory.mktemp(request.param) / f"{request.param}.safetensors"
    golden = Golden(path, arrays)
    save_file(golden.weights, path, Metadata(activation="quick_gelu").to_strings())
    return golden


@pytest.fixture(scope="session")
def vit_b_32(tmp_path_factory) -> Path:
    """A checkpoint of ViT-B/32 at full size with random weights."""
    path = tmp_path_factory.mktemp("vit-b-32") / "random.safetensors"
    command = [sys.executable, ROOT / "tools" / "random_checkpoint.py", "ViT-B/32", path]
    subprocess.run(command, check=True, capture_output=True)
    return path
