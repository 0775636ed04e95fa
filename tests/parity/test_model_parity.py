"""Features and logits of every official architecture at full size, against openai/CLIP itself."""

import pytest
from parity import compare, compare_bfloat16

from npclip.config import ARCHITECTURES


@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_and_logits_equal_openai_clip(name, outliers):
    result = compare(name, outliers)
    assert result.passed, result


@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", "ViT-B/16", "ViT-L/14"])
def test_bfloat16_is_closer_to_float32_than_torchs(name, outliers):
    result = compare_bfloat16(name, outliers)
    assert result["image"].npclip >= 0.9999, result
    for cosines in result.values():
        assert cosines.npclip >= cosines.torch, result
