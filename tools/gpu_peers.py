"""The stages of gpu_check.py that time npclip beside other programs on the same GPU.

Everyone has the same random weights in float16 and the same inputs, images on the device already.
A peer is timed in rounds that take turns with npclip, in one process, and its row has both times.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_journal import Journal
from gpu_kernels import open_kernel_gpu
from gpu_models import (
    captions,
    checkpoint,
    cosine,
    device_timer,
    encoder,
    expected_embeddings,
    pixels,
)
from gpu_rates import interleaved
from parity import import_openai_clip
from safetensors.numpy import load_file

import npclip
from npclip import key_names
from npclip.config import ARCHITECTURES, Config

ROUNDS = 7
EAGER_BATCHES = 1, 64, 256
COMPILED_BATCHES = 256, 1
COMPILE_MODES = "default", "reduce-overhead"
COMPILE_SECONDS = 12, 60  # that must be left for one more shape, for max-autotune
QKV = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def hugging_face_tensors(names: list[str], tensors: dict[str, Any]) -> dict[str, Any]:
    """openai/CLIP's tensors under these names of transformers.CLIPModel."""
    found = {}
    for name in names:
        ours = key_names._from_hugging_face(name)
        if match := QKV.fullmatch(ours):
            joined = tensors[f"{match[1]}in_proj_{match[3]}"]
            third, width = "qkv".index(match[2]), len(joined) // 3
            found[name] = joined[third * width : (third + 1) * width]
        elif ours in tensors:
            is_transposed = name in key_names.HUGGING_FACE_TRANSPOSED
            found[name] = tensors[ours].T if is_transposed else tensors[ours]
    return found


def transformers_clip(config: Config, tensors: dict[str, Any]) -> Any:
    """transformers.CLIPModel with SDPA."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": config.vision_width, "intermediate_size": config.vision_mlp,
        "num_hidden_layers": config.vision_layers, "num_attention_heads": config.vision_heads,
        "image_size": config.image_resolution, "patch_size": config.vision_patch_size,
        "hidden_act": config.activation, "projection_dim": config.embed_dim,
    }  # fmt: skip
    text = {
        "hidden_size": config.transformer_width, "intermediate_size": config.transformer_mlp,
        "num_hidden_layers": config.transformer_layers,
        "num_attention_heads": config.transformer_heads, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length, "hidden_act": config.activation,
        "projection_dim": config.embed_dim, "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
    }  # fmt: skip
    sizes = CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=config.embed_dim,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = CLIPModel(sizes).eval()
    own = hugging_face_tensors(list(model.state_dict()), tensors)
    state = {name: torch.from_numpy(np.array(x, np.float32)) for name, x in own.items()}
    missing, _ = model.load_state_dict(state, strict=False)
    if missing := [name for name in missing if not name.endswith("position_ids")]:
        raise ValueError(f"transformers has other names: {missing[:3]}")
    return model


def openai_clip(config: Config, tensors: dict[str, Any]) -> Any:
    """openai/CLIP's own module."""
    import torch

    state = {name: torch.from_numpy(x) for name, x in tensors.items()}
    return import_openai_clip().model.build_model(state).float().eval()


def open_clip_model(config: Config, tensors: dict[str, Any]) -> Any:
    """open_clip's CLIP."""
    import open_clip
    import torch

    vision = {
        "image_size": config.image_resolution, "layers": config.vision_layers,
        "width": config.vision_width, "patch_size": config.vision_patch_size,
        "head_width": config.vision_width // config.vision_heads,
    }  # fmt: skip
    text = {
        "context_length": config.context_length, "vocab_size": config.vocab_size,
        "width": config.transformer_width, "heads": config.transformer_heads,
        "layers": config.transformer_layers,
    }  # fmt: skip
    model = open_clip.model.CLIP(
        config.embed_dim, vision, text, quick_gelu=config.activation == "quick_gelu"
    )
    state = {name: torch.from_numpy(x.astype(np.float32)) for name, x in tensors.items()}
    model.load_state_dict(state, strict=False)
    return model.eval()


MODULES: dict[str, Callable[[Config, dict[str, Any]], Any]] = {
    "transformers": transformers_clip,
    "open_clip": open_clip_model,
    "clip": openai_clip,
}


def torch_tower(config: Config, what: str, tensors: dict[str, Any], journal: Journal) -> Any:
    """A tower of the first of MODULES that works here, in float32; None if there is none."""
    import torch

    class Tower(torch.nn.Module):
        """forward gives the embeddings as one tensor."""

        def __init__(self, model: Any, is_hugging_face: bool) -> None:
            super().__init__()
            self.model, self.is_hugging_face = model, is_hugging_face

        def forward(self, x: Any) -> Any:
            if not self.is_hugging_face:
                model = self.model
                return model.encode_image(x) if what == "image" else model.encode_text(x)
            get = getattr(self.model, f"get_{what}_features")
            y = get(x)
            return getattr(y, "pooler_output", y)  # newer versions return more

    with contextlib.suppress(ImportError):
        import_openai_clip()  # makes a torchvision that does not fit torch importable, for all
    for name, build in MODULES.items():
        if importlib.util.find_spec(name) is None:
            _missing(journal, name, "not installed")
            continue
        try:
            tower = Tower(build(config, tensors), name == "transformers").requires_grad_(False)
            example = captions(config, 1) if what == "text" else pixels(config, 1)
            tower(torch.from_numpy(example))
        except Exception as error:
            _missing(journal, name, f"{type(error).__name__}: {error}"[:300])
            continue
        journal.fact(torch=torch.__version__, module=name)
        return tower.eval()
    return None


def _missing(journal: Journal, peer: str, reason: str) -> None:
    journal.fact(missing={**journal.facts.get("missing", {}), peer: reason})


def torch_input(config: Config, what: str, batch: int, place: str) -> Any:
    """The inputs that npclip gets, on a device of torch."""
    import torch

    if what == "text":
        return torch.from_numpy(captions(config, batch)).to(place)
    return torch.from_numpy(pixels(config, batch)).to(place, torch.float16)


def encode_with(function: Callable[[Any], Any], x: Any) -> Any:
    """Without gradients."""
    import torch

    with torch.inference_mode():
        return function(x)


def compare(
    journal: Journal, own: Callable[[], Any], other: Callable[[], Any], timer: Any,
    expected: Any, to_host: Callable[[Any], Any], rounds: int = ROUNDS, **row: Any,
) -> None:  # fmt: skip
    """One row: npclip and a peer, in turns; a peer's error is a row, too."""
    try:
        count = min(len(expected), row["batch"])
        found = cosine(to_host(other())[:count], expected[:count])
        seconds = interleaved({"npclip": own, "peer": other}, timer, rounds)
    except Exception as error:
        journal.row(**row, error=f"{type(error).__name__}: {error}"[:300])
        return
    journal.row(
        **row,
        npclip_milliseconds=seconds["npclip"] * 1e3,
        milliseconds=seconds["peer"] * 1e3,
        ratio=seconds["peer"] / seconds["npclip"],
        cosine=found,
    )


def onnx_peers(
    journal: Journal, tower: Any, config: Config, what: str, work: Path
) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """ONNX Runtime on CUDA and with TensorRT, where they are; functions of a torch tensor."""
    if importlib.util.find_spec("onnxruntime") is None:
        _missing(journal, "onnxruntime", "not installed")
        return
    import onnxruntime
    import torch

    wanted = {"onnxruntime CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
    available = onnxruntime.get_available_providers()
    path = work / f"{what}.onnx"
    for name, provider in wanted.items():
        if provider not in available:
            _missing(journal, name, f"no {provider}")
            continue
        try:
            if not path.exists():
                names = {"input_names": ["x"], "output_names": ["y"]}
                axes = {"x": {0: "batch"}, "y": {0: "batch"}}
                example = (torch_input(config, what, 2, "cuda"),)
                torch.onnx.export(tower, example, path, dynamo=False, dynamic_axes=axes, **names)
            options = [(provider, {"trt_fp16_enable": True} if name == "TensorRT" else {})]
            session = onnxruntime.InferenceSession(path, providers=options)
        except Exception as error:
            _missing(journal, name, f"{type(error).__name__}: {error}"[:300])
            continue
        yield name, partial(_run_onnx, session, config.embed_dim)


def _run_onnx(session: Any, width: int, x: Any) -> Any:
    import torch

    y = torch.empty((len(x), width), dtype=torch.float16, device=x.device)
    binding = session.io_binding()
    kinds = {torch.float16: np.float16, torch.int64: np.int64}
    binding.bind_input("x", "cuda", 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, np.float16, tuple(y.shape), y.data_ptr())
    session.run_with_iobinding(binding)
    return y


def peers(
    journal: Journal, tower: Any, config: Config, what: str, work: Path, is_main: bool
) -> Iterator[tuple[str, Callable[[Any], Any], tuple[int, ...], float]]:
    """Name, encoder, batches, and the seconds that a shape needs at first: cheapest first.

    tower: in float16, on the device. is_main: also those that take long to prepare.
    """
    import torch

    yield "torch eager", tower, EAGER_BATCHES, 1
    modes = (*COMPILE_MODES, "max-autotune") if is_main else COMPILE_MODES
    for mode in modes:
        if mode == "max-autotune":
            for name, encode in onnx_peers(journal, tower, config, what, work):
                yield name, encode, EAGER_BATCHES, COMPILE_SECONDS[0]
        torch._dynamo.reset()
        compiled = torch.compile(copy.copy(tower), mode=mode, dynamic=False)
        seconds = COMPILE_SECONDS[mode == "max-autotune"]
        yield f"torch.compile {mode}", compiled, COMPILED_BATCHES, seconds


def peer_stage(journal: Journal, out: Path, work: Path, name: str, what: str) -> str | None:
    """The stages peers-*."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    warnings.filterwarnings("ignore")  # the compilers' advice
    config, path = ARCHITECTURES[name], checkpoint(name, work)
    tower = torch_tower(config, what, load_file(path), journal)
    if tower is None:
        return "no module of CLIP's architecture is installed: transformers, open_clip or clip"
    tower = tower.to("cuda", torch.float16)
    expected = expected_embeddings(path, what)
    model = npclip.load(path, device=str(device), dtype="float16", towers=(what,))
    timer = device_timer(device)
    for peer, encode, batches, seconds in peers(
        journal, tower, config, what, work, name == "ViT-B/32" and what == "image"
    ):
        for batch in batches:
            if journal.left() < seconds:
                _missing(journal, f"{peer}, batch {batch}", "no time left")
                continue
            own, _ = encoder(model, what, device, batch)
            x = torch_input(config, what, batch, "cuda")
            compare(
                journal, own, partial(encode_with, encode, x), timer, expected,
                lambda y: y.float().cpu().numpy(),
                model=name, what=what, batch=batch, peer=peer,
            )  # fmt: skip
    return None
