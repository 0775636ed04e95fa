"""Embeddings of open_clip's own ViTs, whose head width, MLP ratio and activation vary."""

import json

import numpy as np
import pytest
import torch
from parity import import_openai_clip

import npclip

import_openai_clip()  # makes torchvision importable, which open_clip needs
open_clip = pytest.importorskip("open_clip")

# The blocks of open_clip's ViT-H-14 (head width 80), ViT-g-14 (88) and ViT-bigG-14 (104), with
# their MLP ratios, and fewer of them.
VARIANTS = {"ViT-H": (80, 4.0), "ViT-g": (88, 4.3637), "ViT-bigG": (104, 4.9231)}


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_equal_open_clip(tmp_path, variant, quick_gelu):
    head_width, mlp_ratio = VARIANTS[variant]
    vision = {"image_size": 56, "layers": 3, "width": 4 * head_width, "patch_size": 14}
    vision |= {"head_width": head_width, "mlp_ratio": mlp_ratio}
    text = {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3}
    config = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    torch.manual_seed(5)
    model = open_clip.CLIP(**config).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    clip = npclip.load(tmp_path)
    assert clip.config.vision_heads == 4
    images = np.random.default_rng(5).standard_normal((3, 3, 56, 56), dtype=np.float32)
    ids = npclip.tokenize(["", "a diagram", "two cats asleep on a sofa " * 4])
    with torch.no_grad():
        expected_images = model.encode_image(torch.from_numpy(images), normalize=True).numpy()
        expected_texts = model.encode_text(torch.from_numpy(ids), normalize=True).numpy()
    assert np.abs(clip.encode_image(images, normalize=True) - expected_images).max() < 1e-6
    assert np.abs(clip.encode_text(ids, normalize=True) - expected_texts).max() < 1e-6
