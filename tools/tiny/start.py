"""The first weights: openai/CLIP's, but for an image tower that begins as a convolution would.

That patches side by side belong together is what a Vision Transformer must learn from its data, and
20,000 drawings teach it slowly. So it begins with that, as in Zheng et al., "Structured
Initialization for Attention in Vision Transformers" (2024); with random weights it took nearly
twice as many steps. Of the channels of a token

    all but the last head's width    are a patch through whitening filters: the principal components
                                     of training's patches, each divided by its deviation
    the last head's width            are its place p: cos and sin of multiples of row and column

and the first four heads of every block have the query s R p and the key s p, where R turns p into
the p of a neighbour: each of them attends to one neighbour, in which direction depends on the head
and the block. All of it is trained as every other weight is.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npclip.config import Config, Metadata
from npclip.kernels.reference import patchify
from npclip.training import State, initialize, save

Array = NDArray[np.float64]
SAMPLE = 3000  # views whose patches the filters are of
FLOOR = 0.05  # added to each variance, so that noise is not blown up
AMPLITUDE = 1.0  # of places, beside a deviation of about 1 of a patch's channels
SHARPNESS = 4.0  # how much larger the score of a head's neighbour is than of one beside that
REST = 0.1  # what is left of random weights that would disturb this
NEIGHBOURS = (  # down, right: one a head, those of even blocks, of odd blocks
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (-1, -1), (1, -1), (-1, 1)),
)


def write_start(views: Path, target: Path, config: Config) -> None:
    """A checkpoint of these weights, in the place of one that is there. views: a file of them."""
    state = State.start(first_weights(patches_of(views, config), config))
    if target.exists():
        shutil.rmtree(target)
    save(state, target, config, Metadata())


def patches_of(views: Path, config: Config) -> Array:
    """[N G G, 3 P P], as the model sees them, of SAMPLE views."""
    import pyarrow.parquet as pq

    images = pq.read_table(views, columns=["image"])["image"].slice(0, SAMPLE).to_pylist()
    pixels = np.array([np.asarray(Image.open(io.BytesIO(image))) for image in images]) / 255
    pixels = (pixels - Metadata().mean) / Metadata().std
    return patchify(pixels.transpose(0, 3, 1, 2), config.vision_patch_size)


def first_weights(patches: Array, config: Config, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """float32 parameters of a new model. patches: as of patches_of."""
    params = {name: x.astype(np.float64) for name, x in initialize(config, seed).items()}
    width, head = config.vision_width, config.vision_width // config.vision_heads
    content, place = slice(0, width - head), slice(width - head, width)

    filters = np.zeros((width, patches.shape[1]))
    filters[content] = whitening(patches, width - head)
    params["visual.conv1.weight"] = filters.reshape(params["visual.conv1.weight"].shape)
    places = np.zeros((config.grid**2, width))
    places[:, place] = AMPLITUDE * codes(config.grid, head)
    embedding = params["visual.positional_embedding"]
    embedding *= REST
    embedding[1:] += places  # the class token is nowhere

    tokens = patches @ filters.T + np.tile(places, (len(patches) // len(places), 1))
    seen = AMPLITUDE / tokens.std(1).mean()  # the amplitude behind a LayerNorm
    drop = head // 4 - np.cos(frequencies(config.grid, head)).sum()  # of p . p' to a place beside
    scale = np.sqrt(SHARPNESS * np.sqrt(head) / drop) / seen
    for block in range(config.vision_layers):
        prefix = f"visual.transformer.resblocks.{block}"
        weight = params[f"{prefix}.attn.in_proj_weight"]  # of queries, keys, values
        for number, neighbour in enumerate(NEIGHBOURS[block % 2]):
            queries = slice(number * head, (number + 1) * head)
            keys = slice(width + number * head, width + (number + 1) * head)
            weight[queries] *= REST
            weight[keys] *= REST
            weight[queries, place] += scale * turn(*neighbour, config.grid, head)
            weight[keys, place] += scale * np.eye(head)
        for name in ("attn.out_proj", "mlp.c_proj"):  # blocks leave places as they are
            params[f"{prefix}.{name}.weight"][place] *= REST
    return {name: np.asarray(x, np.float32, order="C") for name, x in params.items()}


def whitening(patches: Array, count: int) -> Array:
    """[count, values]: filters of the components that vary most, each of variance 1."""
    variances, components = np.linalg.eigh(np.cov(patches.T))
    return (components / np.sqrt(variances + FLOOR)).T[::-1][:count]


def frequencies(grid: int, head: int) -> Array:
    """[head / 4], of which cos and sin tell all rows of a grid apart."""
    count = head // 4
    return np.pi * np.arange(1, count + 1) / max(grid, count)


def codes(grid: int, head: int) -> Array:
    """[grid^2, head]: cos, sin, cos, ... of the row, then of the column."""
    angles = np.arange(grid)[:, None] * frequencies(grid, head)
    of_one = np.stack([np.cos(angles), np.sin(angles)], -1).reshape(grid, -1)
    row, column = np.divmod(np.arange(grid**2), grid)
    return np.concatenate([of_one[row], of_one[column]], 1)


def turn(down: int, right: int, grid: int, head: int) -> Array:
    """[head, head]: the code of a place -> that of another one, so far down and right of it."""
    matrix = np.zeros((head, head))
    for half, steps in enumerate((down, right)):
        for k, angle in enumerate(frequencies(grid, head) * steps):
            i = half * head // 2 + 2 * k
            matrix[i : i + 2, i : i + 2] = [
                [np.cos(angle), -np.sin(angle)],
                [np.sin(angle), np.cos(angle)],
            ]
    return matrix
