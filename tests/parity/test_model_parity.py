"""Features and logits of every official architecture at full size, against openai/CLIP itself."""

import pytest
from parity import compare

from npclip.config import ARCHITECTURES


@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_and_logits_equal_openai_clip(name, outliers):
    result = compare(name, outliers)
    assert result.passed, result
