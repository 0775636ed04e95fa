"""What a CLIP model looks like: its Config, read from its tensors' shapes, and those shapes again.

A leaf: pure Python. The activation and, for some widths, the number of heads cannot be read from
shapes; they come from Metadata, which every checkpoint that npclip writes carries with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import CheckpointError, UnknownActivationError
from .preprocess import OPENAI_MEAN, OPENAI_STD

Shape = tuple[int, ...]
FORMAT_VERSION = "1"
ACTIVATIONS = ("quick_gelu", "gelu")
BOTTLENECK_EXPANSION = 4  # a ResNet bottleneck block puts out 4x its planes
HEAD_WIDTH = 64  # every OpenAI model; open_clip's exceptions follow, by (width, layers)
OTHER_HEADS = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16}  # ViT-H/14, ViT-g/14, ViT-bigG/14


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint must say in words, because its tensors' shapes do not.

    activation is "quick_gelu", "gelu" or None (not recorded). resize is "shortest" (resize the
    shorter side, crop the centre: OpenAI's rule) or "squash" (resize both sides, no crop).
    """

    activation: str | None = None
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resize: str = "shortest"
    interpolation: str = "bicubic"
    vision_heads: int | None = None
    text_heads: int | None = None
    source: str | None = None  # file name of the checkpoint that this one was converted from
    source_sha256: str | None = None

    def __post_init__(self) -> None:
        """Reject values that no code here implements."""
        choices = {"activation": (*ACTIVATIONS, None), "resize": ("shortest", "squash")}
        choices["interpolation"] = ("bicubic", "bilinear")
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                names = ", ".join(str(a) for a in allowed if a)
                raise CheckpointError(f"{field} {getattr(self, field)!r} is not one of: {names}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if len(value) != 3 or not all(-1e3 < v < 1e3 for v in value):
                raise CheckpointError(f"{field} must be three numbers, not {value!r}")
        if not all(v > 0 for v in self.std):
            raise CheckpointError(f"std must be positive, not {self.std!r}")
        for field in ("vision_heads", "text_heads"):
            if (heads := getattr(self, field)) is not None and heads < 1:
                raise CheckpointError(f"{field} must be positive, not {heads}")

    def to_strings(self) -> dict[str, str]:
        """The safetensors metadata (str -> str) that records this."""
        strings = {"format": "npclip", "format_version": FORMAT_VERSION}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = " ".join(map(repr, value))
            if value is not None:
                strings[field.name] = str(value)
        return strings

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> Metadata:
        """Inverse of to_strings; keys that it does not know are ignored.

        Raises CheckpointError for a newer format version or a value that does not parse.
        """
        version = strings.get("format_version", FORMAT_VERSION)
        if strings.get("format") == "npclip" and version != FORMAT_VERSION:
            raise CheckpointError(f"written by a newer npclip (format {version}): upgrade npclip")
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            if (text := strings.get(field.name)) is None:
                continue
            try:
                if field.name in ("mean", "std"):
                    values[field.name] = tuple(float(v) for v in text.split())
                else:
                    values[field.name] = int(text) if field.name.endswith("heads") else text
            except ValueError:
                raise CheckpointError(f"metadata {field.name}={text!r} does not parse") from None
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of one CLIP model, in openai/CLIP's words.

    vision_layers is an int for a Vision Transformer, a 4-tuple (blocks per stage) for a
    ModifiedResNet, whose patch size is 0. *_mlp is the hidden width of the MLPs.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch_size: int
    vision_heads: int
    vision_mlp: int
    context_length: int
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    transformer_mlp: int
    activation: str = "quick_gelu"

    @property
    def is_vit(self) -> bool:
        """True for a Vision Transformer, False for a ModifiedResNet."""
        return self.vision_patch_size > 0

    @property
    def grid(self) -> int:
        """Patches (ViT) or final feature-map cells (ResNet) along one side of the image."""
        return self.image_resolution // (self.vision_patch_size or 32)


def _openai(
    embed: int, resolution: int, layers: int | tuple[int, ...], width: int, patch: int,
    text_width: int,
) -> Config:  # fmt: skip
    heads = width // HEAD_WIDTH if patch else width * 32 // HEAD_WIDTH
    return Config(
        embed, resolution, layers, width, patch, heads, 4 * width,
        77, 49408, text_width, text_width // HEAD_WIDTH, 12, 4 * text_width,
    )  # fmt: skip


ARCHITECTURES: dict[str, Config] = {
    # name                    embed  image  layers          width patch text width
    "RN50": _openai(1024, 224, (3, 4, 6, 3), 64, 0, 512),
    "RN101": _openai(512, 224, (3, 4, 23, 3), 64, 0, 512),
    "RN50x4": _openai(640, 288, (4, 6, 10, 6), 80, 0, 640),
    "RN50x16": _openai(768, 384, (6, 8, 18, 8), 96, 0, 768),
    "RN50x64": _openai(1024, 448, (3, 15, 36, 10), 128, 0, 1024),
    "ViT-B/32": _openai(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _openai(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _openai(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _openai(768, 336, 24, 1024, 14, 768),
}


def tensor_shapes(config: Config, towers: Iterable[str] = ("image", "text")) -> dict[str, Shape]:
    """Every parameter of the model -> its shape, in openai/CLIP's state_dict names."""
    shapes: dict[str, Shape] = {}
    if "image" in towers:
        shapes |= _vit_shapes(config) if config.is_vit else _resnet_shapes(config)
    if "text" in towers:
        width = config.transformer_width
        shapes |= {
            "token_embedding.weight": (config.vocab_size, width),
            "positional_embedding": (config.context_length, width),
            "ln_final.weight": (width,),
            "ln_final.bias": (width,),
            "text_projection": (width, config.embed_dim),
        }
        for i in range(config.transformer_layers):
            shapes |= _block_shapes(f"transformer.resblocks.{i}.", width, config.transformer_mlp)
    return shapes | {"logit_scale": ()}


def _block_shapes(prefix: str, width: int, mlp: int) -> dict[str, Shape]:
    return {
        prefix + "ln_1.weight": (width,),
        prefix + "ln_1.bias": (width,),
        prefix + "attn.in_proj_weight": (3 * width, width),
        prefix + "attn.in_proj_bias": (3 * width,),
        prefix + "attn.out_proj.weight": (width, width),
        prefix + "attn.out_proj.bias": (width,),
        prefix + "ln_2.weight": (width,),
        prefix + "ln_2.bias": (width,),
        prefix + "mlp.c_fc.weight": (mlp, width),
        prefix + "mlp.c_fc.bias": (mlp,),
        prefix + "mlp.c_proj.weight": (width, mlp),
        prefix + "mlp.c_proj.bias": (width,),
    }


def _vit_shapes(config: Config) -> dict[str, Shape]:
    width, patch = config.vision_width, config.vision_patch_size
    assert isinstance(config.vision_layers, int)
    shapes: dict[str, Shape] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (config.grid**2 + 1, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
        "visual.proj": (width, config.embed_dim),
    }
    for i in range(config.vision_layers):
        shapes |= _block_shapes(f"visual.transformer.resblocks.{i}.", width, config.vision_mlp)
    return shapes


def _resnet_shapes(config: Config) -> dict[str, Shape]:
    assert isinstance(config.vision_layers, tuple)
    width, shapes = config.vision_width, dict[str, Shape]()

    def conv_bn(conv: str, bn: str, out: int, inp: int, kernel: int) -> None:
        shapes[f"visual.{conv}.weight"] = (out, inp, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"visual.{bn}.{name}"] = (out,)

    conv_bn("conv1", "bn1", width // 2, 3, 3)
    conv_bn("conv2", "bn2", width // 2, width // 2, 3)
    conv_bn("conv3", "bn3", width, width // 2, 3)
    channels = width
    for stage, blocks in enumerate(config.vision_layers):
        planes = width << stage
        for b in range(blocks):
            name = f"layer{stage + 1}.{b}."
            conv_bn(name + "conv1", name + "bn1", planes, channels, 1)
            conv_bn(name + "conv2", name + "bn2", planes, planes, 3)
            conv_bn(name + "conv3", name + "bn3", planes * BOTTLENECK_EXPANSION, planes, 1)
            if b == 0:
                out = planes * BOTTLENECK_EXPANSION
                conv_bn(name + "downsample.0", name + "downsample.1", out, channels, 1)
            channels = planes * BOTTLENECK_EXPANSION
    shapes["visual.attnpool.positional_embedding"] = (config.grid**2 + 1, channels)
    for name, out in [(n, channels) for n in "kqv"] + [("c", config.embed_dim)]:
        shapes[f"visual.attnpool.{name}_proj.weight"] = (out, channels)
        shapes[f"visual.attnpool.{name}_proj.bias"] = (out,)
    return shapes


def image_resolution(shapes: Mapping[str, Shape]) -> int | None:
    """Pixels a side of the images that these tensors (see infer_config) take; None: no images."""
    if "visual.proj" in shapes:
        grid = _side(shapes, "visual.positional_embedding")
        return grid * _dims(shapes, "visual.conv1.weight", 4)[2]
    if "visual.layer1.0.conv1.weight" in shapes:
        return _side(shapes, "visual.attnpool.positional_embedding") * 32
    return None


def infer_config(shapes: Mapping[str, Shape], metadata: Metadata) -> Config:
    """Config of the model whose tensors have these shapes (names as in openai/CLIP).

    A tower that is absent leaves its numbers at 0. Raises CheckpointError where the tensors are
    not those of a CLIP model, UnknownActivationError where metadata does not give the activation.
    """
    vision = _infer_vision(shapes, metadata) if any(k.startswith("visual.") for k in shapes) else {}
    text = _infer_text(shapes, metadata) if "token_embedding.weight" in shapes else {}
    if not vision and not text:
        some = ", ".join(sorted(shapes)[:3]) or "none at all"
        raise CheckpointError(f"not a CLIP model: no visual.* nor text tensors (it has {some})")
    if vision and text and vision["embed_dim"] != text["embed_dim"]:
        raise CheckpointError(
            f"the image tower embeds in {vision['embed_dim']} dimensions, "
            f"the text tower in {text['embed_dim']}"
        )
    if metadata.activation is None:
        raise UnknownActivationError(
            "nothing in the checkpoint says whether it uses QuickGELU or GELU: "
            'pass activation="quick_gelu" (OpenAI, DFN, MetaCLIP and all ResNets) or "gelu" '
            "(most open_clip models); the wrong one costs several points of accuracy"
        )
    numbers = {f.name: 0 for f in dataclasses.fields(Config)}
    return Config(**(numbers | vision | text | {"activation": metadata.activation}))  # type: ignore[arg-type]


def _dims(shapes: Mapping[str, Shape], key: str, rank: int) -> Shape:
    if key not in shapes:
        raise CheckpointError(f"tensor {key} is missing")
    shape = shapes[key]
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"tensor {key} has shape {list(shape)}, not {rank} dimensions >= 1")
    return shape


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return len({m.group(1) for key in shapes if (m := re.match(pattern, key))})


def _heads(width: int, layers: int, recorded: int | None) -> int:
    heads = recorded or OTHER_HEADS.get((width, layers)) or width // HEAD_WIDTH
    if heads == 0 or width % heads:
        raise CheckpointError(f"width {width} does not divide into {heads} heads")
    return heads


def _infer_text(shapes: Mapping[str, Shape], metadata: Metadata) -> dict[str, object]:
    vocab, width = _dims(shapes, "token_embedding.weight", 2)
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    return {
        "embed_dim": _dims(shapes, "text_projection", 2)[1],
        "context_length": _dims(shapes, "positional_embedding", 2)[0],
        "vocab_size": vocab,
        "transformer_width": width,
        "transformer_heads": _heads(width, layers, metadata.text_heads),
        "transformer_layers": layers,
        "transformer_mlp": _dims(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
    }


def _infer_vision(shapes: Mapping[str, Shape], metadata: Metadata) -> dict[str, object]:
    if "visual.proj" in shapes:
        width, _, patch, _ = _dims(shapes, "visual.conv1.weight", 4)
        layers = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        return {
            "embed_dim": _dims(shapes, "visual.proj", 2)[1],
            "image_resolution": image_resolution(shapes),
            "vision_layers": layers,
            "vision_width": width,
            "vision_patch_size": patch,
            "vision_heads": _heads(width, layers, metadata.vision_heads),
            "vision_mlp": _dims(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        }
    if "visual.layer1.0.conv1.weight" in shapes:
        width = _dims(shapes, "visual.layer1.0.conv1.weight", 4)[0]
        stages = [_count(shapes, rf"visual\.layer{s}\.(\d+)\.") for s in (1, 2, 3, 4)]
        return {
            "embed_dim": _dims(shapes, "visual.attnpool.c_proj.weight", 2)[0],
            "image_resolution": image_resolution(shapes),
            "vision_layers": tuple(stages),
            "vision_width": width,
            "vision_patch_size": 0,
            "vision_heads": _heads(32 * width, 0, metadata.vision_heads),
            "vision_mlp": 4 * width,
        }
    raise CheckpointError(
        "the image tower is neither CLIP's Vision Transformer (visual.proj) "
        "nor its ModifiedResNet (visual.layer1.0.conv1.weight)"
    )


def _side(shapes: Mapping[str, Shape], key: str) -> int:
    rows = _dims(shapes, key, 2)[0]
    side = round((rows - 1) ** 0.5)
    if side < 1 or side * side + 1 != rows:
        raise CheckpointError(f"tensor {key} has {rows} rows, which is not 1 + a square")
    return side
