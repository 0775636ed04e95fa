"""A tiny model with the real vocabulary, and photos of two classes that it tells apart."""

import dataclasses

import numpy as np
import pytest
import tiny_models
from PIL import Image
from random_checkpoint import random_tensors
from safetensors.numpy import save_file

from npclip.config import Metadata


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    config = dataclasses.replace(tiny_models.VIT, context_length=77, vocab_size=49408)
    save_file(random_tensors(config), path, Metadata(activation="gelu").to_strings())
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """photos/dark and photos/light, 12 each, noise around two levels."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, level in (("dark", 50), ("light", 200)):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.normal(level, 30, (24, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
