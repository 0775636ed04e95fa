"""The model that comes with npclip in openai/CLIP's own code: trained weights, real pictures."""

from pathlib import Path

import numpy as np

import npclip
from npclip.training import from_checkpoint

DRAWINGS = sorted((Path(__file__).parents[2] / "examples" / "drawings").glob("*.png"))
NAMES = [path.stem.replace("-", " ") for path in DRAWINGS]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_embeddings_are_those_of_openai_clip(openai_clip):
    import torch

    params, c, _ = from_checkpoint("tiny")
    vision = c.embed_dim, c.image_resolution, c.vision_layers, c.vision_width, c.vision_patch_size
    text = c.context_length, c.vocab_size, c.transformer_width, c.transformer_heads
    theirs = openai_clip.model.CLIP(*vision, *text, c.transformer_layers).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in params.items()})
    for block in theirs.visual.transformer.resblocks:  # there heads are always 64 wide
        block.attn.num_heads = c.vision_heads
        block.attn.head_dim = c.vision_width // c.vision_heads
    ours = npclip.load("tiny", device="cpu")
    pixels = np.stack([ours.preprocess(path) for path in DRAWINGS])
    ids = npclip.tokenize(NAMES, c.context_length, vocab_size=c.vocab_size)
    with torch.no_grad():
        images = theirs.encode_image(torch.from_numpy(pixels)).numpy()
        texts = theirs.encode_text(torch.from_numpy(ids)).numpy()
    bound = 1e-6  # as tools/parity.py
    assert abs(ours.encode_image(pixels, normalize=True) - unit(images)).max() <= bound
    assert abs(ours.encode_text(ids, normalize=True) - unit(texts)).max() <= bound
