"""Whether an installed npclip computes: run by the release on every wheel, not by pytest.

python tests/smoke.py kernels    # or numpy: what must compute

It needs nothing but npclip's own dependencies: a small model with openai/CLIP's outputs is in
tests/data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import npclip
from npclip.config import Metadata

TESTS = Path(__file__).resolve().parent


def main() -> None:
    """Raises AssertionError where the backend or an embedding is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=["kernels", "numpy"])
    backend = parser.parse_args().backend
    assert TESTS.parent not in Path(npclip.__file__).resolve().parents, "not the installed one"
    used = npclip.show_config(mode="dicts")["cpu backend"]
    assert used.startswith("NumPy") == (backend == "numpy"), used
    with np.load(TESTS / "data" / "golden_vit.npz") as file, tempfile.TemporaryDirectory() as work:
        golden = dict(file)
        path = Path(work) / "golden.safetensors"
        weights = {k.removeprefix("weights/"): v for k, v in golden.items() if "weights/" in k}
        save_file(weights, path, Metadata(activation="quick_gelu").to_strings())
        model = npclip.load(path, device="cpu")
        _compare(model.encode_image(golden["images"]), golden["quick_gelu/image"])
        _compare(model.encode_text(golden["ids"]), golden["quick_gelu/text"])
        pixels = model.preprocess(TESTS / "data" / "chelsea.png")
        assert pixels.shape == (3, 64, 64), pixels.shape
    assert npclip.tokenize("a cat")[0, :4].tolist() == [49406, 320, 2368, 49407]
    command = [sys.executable, "-m", "npclip", "models"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "ViT-B/32" in listed, listed
    print(f"npclip {npclip.__version__} computes by {used}")


def _compare(found: np.ndarray, expected: np.ndarray) -> None:
    """Rows of both, normalised, within the rounding of any BLAS."""
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (found, expected)]
    difference = np.abs(unit[0] - unit[1]).max()
    assert difference < 1e-5, difference


if __name__ == "__main__":
    main()
