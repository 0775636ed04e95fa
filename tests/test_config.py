"""Config from shapes and back; Metadata to strings and back."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npclip.config import (
    ARCHITECTURES,
    Config,
    Metadata,
    image_resolution,
    infer_config,
    tensor_shapes,
)
from npclip.errors import CheckpointError, UnknownActivationError

QUICK = Metadata(activation="quick_gelu")
PARAMETERS = {  # openai/CLIP's model cards and the checkpoints themselves
    "RN50": 102_007_137, "RN101": 119_688_033, "RN50x4": 178_300_601, "RN50x16": 290_979_217,
    "RN50x64": 623_258_305, "ViT-B/32": 151_277_313, "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513, "ViT-L/14@336px": 427_944_193,
}  # fmt: skip


def count(shapes):
    total = 0
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        total += size * (".running_" not in name)
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_official_models_have_the_official_number_of_parameters(name):
    assert count(tensor_shapes(ARCHITECTURES[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_config_is_read_back_from_the_shapes(name):
    config = ARCHITECTURES[name]
    assert infer_config(tensor_shapes(config), QUICK) == config


HEADS = st.integers(1, 4)


@given(
    vit=st.booleans(), grid=st.integers(1, 20), patch=st.integers(1, 40), heads=HEADS,
    text_heads=HEADS, layers=st.integers(1, 13), embed=st.integers(1, 2048),
    head_width=st.sampled_from([8, 64, 80, 88, 104]), mlp=st.integers(1, 5000),
)  # fmt: skip
def test_any_config_is_read_back_from_its_shapes(
    vit, grid, patch, heads, text_heads, layers, embed, head_width, mlp
):
    config = Config(
        embed_dim=embed, image_resolution=grid * (patch if vit else 32),
        vision_layers=layers if vit else (layers, 1, 2, 1),
        vision_width=heads * head_width, vision_patch_size=patch if vit else 0,
        vision_heads=heads, vision_mlp=mlp if vit else 4 * heads * head_width,
        context_length=77, vocab_size=100, transformer_width=text_heads * head_width,
        transformer_heads=text_heads, transformer_layers=layers, transformer_mlp=mlp,
        activation="gelu",
    )  # fmt: skip
    metadata = Metadata(activation="gelu", vision_heads=heads, text_heads=text_heads)
    assert infer_config(tensor_shapes(config), metadata) == config


@pytest.mark.parametrize(
    ("width", "layers", "heads"), [(1280, 32, 16), (1408, 40, 16), (1664, 48, 16), (768, 12, 12)]
)
def test_open_clips_head_widths_are_known_by_size(width, layers, heads):
    config = dataclasses.replace(
        ARCHITECTURES["ViT-L/14"], vision_width=width, vision_layers=layers, vision_heads=heads
    )
    assert infer_config(tensor_shapes(config), QUICK).vision_heads == heads


def test_one_tower_alone():
    config = ARCHITECTURES["ViT-B/32"]
    image = infer_config(tensor_shapes(config, ("image",)), QUICK)
    assert (image.vision_layers, image.transformer_layers) == (12, 0)
    text = infer_config(tensor_shapes(config, ("text",)), QUICK)
    assert (text.vision_layers, text.transformer_layers) == (0, 12)


def test_the_resolution_is_known_without_metadata():
    for config in ARCHITECTURES.values():
        assert image_resolution(tensor_shapes(config)) == config.image_resolution
    assert image_resolution(tensor_shapes(ARCHITECTURES["RN50"], ("text",))) is None


def without(name):
    shapes = tensor_shapes(ARCHITECTURES["ViT-B/32"])
    del shapes[name]
    return shapes


def changed(name, shape, model="ViT-B/32"):
    return tensor_shapes(ARCHITECTURES[model]) | {name: shape}


BAD = {
    "no CLIP at all": ({"fc.weight": (3, 4)}, "not a CLIP model.*fc.weight"),
    "nothing": ({}, "not a CLIP model"),
    "conv1 missing": (without("visual.conv1.weight"), "visual.conv1.weight is missing"),
    "projection missing": (without("text_projection"), "text_projection is missing"),
    "unknown tower": (without("visual.proj"), "neither"),
    "embeddings differ": (changed("visual.proj", (768, 500)), "500 dimensions.*512"),
    "not a square": (changed("visual.positional_embedding", (49, 768)), "not 1 \\+ a square"),
    "wrong rank": (changed("visual.conv1.weight", (768, 3)), r"\[768, 3\]"),
    "empty": (changed("token_embedding.weight", (0, 512)), r"\[0, 512\]"),
    "odd width": (changed("token_embedding.weight", (9, 500)), "500 does not divide"),
}


@pytest.mark.parametrize(("shapes", "message"), BAD.values(), ids=BAD)
def test_what_is_not_clip_is_an_error_that_says_why(shapes, message):
    with pytest.raises(CheckpointError, match=message):
        infer_config(shapes, QUICK)


def test_an_unknown_activation_is_an_error_that_says_what_to_do():
    with pytest.raises(UnknownActivationError, match='activation="quick_gelu"'):
        infer_config(tensor_shapes(ARCHITECTURES["RN50"]), Metadata())


numbers = st.tuples(*[st.floats(1e-6, 100)] * 3)
names = st.none() | st.text(max_size=20)


@given(
    st.builds(
        Metadata,
        activation=st.sampled_from(["quick_gelu", "gelu", None]),
        mean=numbers,
        std=numbers,
        resize=st.sampled_from(["shortest", "squash"]),
        interpolation=st.sampled_from(["bicubic", "bilinear"]),
        vision_heads=st.none() | st.integers(1, 99),
        text_heads=st.none() | st.integers(1, 99),
        source=names,
        source_sha256=names,
    )
)
def test_metadata_survives_the_way_through_strings(metadata):
    strings = metadata.to_strings()
    assert all(isinstance(v, str) for v in strings.values())
    assert Metadata.from_strings(strings) == metadata


@pytest.mark.parametrize(
    "strings",
    [
        {"activation": "tanh"},
        {"mean": "0.5 0.5"},
        {"mean": "a b c"},
        {"std": "1 1 0"},
        {"std": "nan nan nan"},
        {"resize": "longest"},
        {"interpolation": "nearest"},
        {"vision_heads": "twelve"},
        {"text_heads": "0"},
        {"format": "npclip", "format_version": "2"},
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense_is_an_error(strings):
    with pytest.raises(CheckpointError):
        Metadata.from_strings(strings)
