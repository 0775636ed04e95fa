"""A tiny model with the real vocabulary, and photos of two classes that it tells apart."""

import numpy as np
import pytest
import tiny_models
from PIL import Image


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(tiny_models.save_words(tmp_path_factory.mktemp("model")))


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
