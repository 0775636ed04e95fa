"""The stages of gpu_check.py that time npclip beside other programs on the same GPU.

Everyone has the same random weights in float16 and the same inputs, images on the device already.
A peer is timed in rounds that take turns with npclip, in one process, and its row has both times
and both errors, against embeddings in float64. plan() has what is measured, in order of value: a
stage takes as much of it as it has time for, and a later run of gpu_check.py goes on from there.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_journal import Journal
from gpu_kernels import errors, open_kernel_gpu
from gpu_models import (
    BATCHES,
    captions,
    checkpoint,
    cosine,
    device_timer,
    encoder,
    expected_embeddings,
    flop_of,
    pixels,
)
from gpu_rates import LEAST_SECONDS, interleaved
from parity import import_openai_clip
from safetensors.numpy import load_file

import npclip
from npclip import key_names
from npclip.config import ARCHITECTURES, Config

ROUNDS = 7
EAGER, COMPILED = "torch eager", "torch.compile "
DEFAULT, REDUCE, MAX = (f"{COMPILED}{m}" for m in ("default", "reduce-overhead", "max-autotune"))
ONNX = {"onnxruntime CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
DECISIVE = {  # batches that the project's targets name; most important first
    ("ViT-B/32", "image"): (256, 1, 1024), ("ViT-L/14", "image"): (256, 1, 1024),
    ("ViT-B/32", "text"): (256,), ("ViT-L/14@336px", "image"): (256, 1024),
}  # fmt: skip
PREPARATION = {EAGER: 2.0, DEFAULT: 10.0, REDUCE: 10.0, MAX: 60.0}  # seconds, of 12 blocks
WARM_UP = 3  # calls
SLOW_FLOP = 2e14  # a second: what a case takes at most is reckoned with it
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
    """One row: npclip and a peer, in turns; a peer's failure is a row, too."""
    wanted = expected[: row["batch"]]
    try:
        for _ in range(WARM_UP):  # torch.compile records its graph in the second call
            found = other()
        y = np.asarray(to_host(found)[: len(wanted)], np.float64)
        ours = np.asarray(npclip.asnumpy(own()[: len(wanted)]), np.float64)
        seconds = interleaved({"npclip": own, "peer": other}, timer, rounds, 2 * LEAST_SECONDS)
    except Exception as error:
        journal.row(**row, error=f"{type(error).__name__}: {error}"[:300])
        return
    journal.row(
        **row,
        npclip_milliseconds=seconds["npclip"] * 1e3,
        milliseconds=seconds["peer"] * 1e3,
        ratio=seconds["peer"] / seconds["npclip"],
        cosine=cosine(y, wanted),
        error_of_npclip=errors(ours, wanted)[0],
        error_of_peer=errors(y, wanted)[0],
    )


def plan(name: str, what: str) -> list[tuple[str, int]]:
    """Peers and batches: what the targets name first, then what is cheap, then the rest."""
    decisive = DECISIVE.get((name, what), ())
    found = [(peer, batch) for batch in decisive[:2] for peer in (EAGER, REDUCE)]
    found += [(DEFAULT, batch) for batch in decisive[:2]]
    found += [(peer, batch) for batch in decisive[2:] for peer in (EAGER, REDUCE, DEFAULT)]
    found += [(EAGER, batch) for batch in BATCHES]
    if (name, what) == ("ViT-B/32", "image"):
        found += [(MAX, 256), (MAX, 1)]
        found += [(peer, batch) for peer in ONNX for batch in (256, 1)]
    found += [(peer, batch) for batch in BATCHES for peer in (DEFAULT, REDUCE)]
    return list(dict.fromkeys(found))


def seconds_needed(peer: str, layers: int, flop: float) -> float:
    """To prepare a peer for one more shape and to time both sides."""
    calls = 2 * (ROUNDS + WARM_UP + 2)
    return PREPARATION.get(peer, 20.0) * layers / 12 + calls * flop / SLOW_FLOP


class Unavailable(Exception):
    """A peer that is not here."""


class Peers:
    """Makes functions of a torch tensor that give embeddings."""

    def __init__(self, tower: Any, config: Config, what: str, work: Path) -> None:
        """tower: in float16, on the device."""
        self.tower, self.config, self.what, self.work = tower, config, what, work
        self.sessions: dict[str, Callable[[Any], Any]] = {}

    def encoder(self, peer: str) -> Callable[[Any], Any]:
        """Raises Unavailable. What torch.compile made for an earlier one is forgotten."""
        if peer == EAGER:
            return self.tower
        if peer in ONNX:
            if peer not in self.sessions:
                self.sessions[peer] = self._session(peer)
            return self.sessions[peer]
        import torch
        import torch._dynamo.utils

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        mode = peer.removeprefix(COMPILED)
        return torch.compile(copy.copy(self.tower), mode=mode, dynamic=False)

    def _session(self, peer: str) -> Callable[[Any], Any]:
        if importlib.util.find_spec("onnxruntime") is None:
            raise Unavailable("onnxruntime is not installed")
        import onnxruntime
        import torch

        if ONNX[peer] not in onnxruntime.get_available_providers():
            raise Unavailable(f"onnxruntime has no {ONNX[peer]}")
        path = self.work / f"{self.what}.onnx"
        if not path.exists():
            names = {"input_names": ["x"], "output_names": ["y"]}
            axes = {"x": {0: "batch"}, "y": {0: "batch"}}
            example = (torch_input(self.config, self.what, 2, "cuda"),)
            part = path.with_suffix(".part")
            torch.onnx.export(self.tower, example, part, dynamo=False, dynamic_axes=axes, **names)
            part.replace(path)
        how = {"trt_fp16_enable": True} if peer == "TensorRT" else {}
        session = onnxruntime.InferenceSession(path, providers=[(ONNX[peer], how)])
        if ONNX[peer] not in session.get_providers():
            raise Unavailable(f"onnxruntime cannot use its {ONNX[peer]}")
        return partial(_run_onnx, session, self.config.embed_dim)


def graph_breaks() -> dict[str, int]:
    """Where torch.compile gave up parts since Peers.encoder, if anywhere."""
    import torch._dynamo.utils

    counters = torch._dynamo.utils.counters
    skips = counters["inductor"].get("cudagraph_skips", 0)
    found = {"graph_breaks": sum(counters["graph_break"].values()), "cudagraph_skips": skips}
    return {name: count for name, count in found.items() if count}


def _run_onnx(session: Any, width: int, x: Any) -> Any:
    import torch

    y = torch.empty((len(x), width), dtype=torch.float16, device=x.device)
    binding = session.io_binding()
    kinds = {torch.float16: np.float16, torch.int64: np.int64}
    binding.bind_input("x", "cuda", 0, kinds[x.dtype], tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, np.float16, tuple(y.shape), y.data_ptr())
    session.run_with_iobinding(binding)
    return y


def missing_for_peers() -> str | None:
    """What torch lacks here, in words."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    try:
        import torch
    except Exception as error:
        return f"torch does not load: {type(error).__name__}: {error}"[:300]
    return None if torch.cuda.is_available() else "torch finds no GPU"


def peer_stage(journal: Journal, out: Path, work: Path, name: str, what: str) -> str | None:
    """The stages peers-*."""
    device = open_kernel_gpu()
    if isinstance(device, str):
        return device
    if reason := missing_for_peers():
        return reason
    warnings.filterwarnings("ignore")  # the compilers' advice
    config, path = ARCHITECTURES[name], checkpoint(name, work)
    tower = torch_tower(config, what, load_file(path), journal)
    if tower is None:
        return "no module of CLIP's architecture is installed: transformers, open_clip or clip"
    peers = Peers(tower.half().cuda(), config, what, work)
    expected = expected_embeddings(path, what)
    model = npclip.load(path, device=str(device), dtype="float16", towers=(what,))
    layers = config.transformer_layers if what == "text" else config.vision_layers
    for peer, batch in ordered(plan(name, what), journal.earlier_facts.get("at")):
        key = {"model": name, "what": what, "batch": batch, "peer": peer}
        if journal.has(**key) or peer in journal.facts.get("missing", {}):
            continue
        if journal.left() < seconds_needed(peer, layers, flop_of(config, what, batch)):
            journal.leave_out(f"{peer}, batch {batch}")
            continue
        journal.fact(at=[peer, batch])
        _measure(journal, peers, encoder(model, what, device, batch), device, expected, key)
        journal.fact(at=None)
        free_memory(device)
    return None


def ordered(cases: list[tuple[str, int]], cut_off: list[Any] | None) -> list[tuple[str, int]]:
    """What an earlier run was cut off in comes last, lest it take this one's time, too."""
    return sorted(cases, key=lambda case: list(case) == cut_off)


def _measure(
    journal: Journal, peers: Peers, own: Callable[[], Any], device: Any, expected: Any,
    key: dict[str, Any],
) -> None:  # fmt: skip
    """One row, or a word on why there is none."""
    peer, start = key["peer"], time.monotonic()
    try:
        encode = peers.encoder(peer)
    except Exception as error:
        reason = (
            str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
        )
        _missing(journal, peer, reason[:300])
        return
    x = torch_input(peers.config, peers.what, key["batch"], "cuda")
    compare(
        journal, own, partial(encode_with, encode, x), device_timer(device), expected,
        lambda y: y.float().cpu().numpy(), **key,
    )  # fmt: skip
    journal.rows[-1] |= graph_breaks() if peer.startswith(COMPILED) else {}
    journal.rows[-1]["seconds"] = round(time.monotonic() - start, 1)


def free_memory(device: Any) -> None:
    """Of both allocators: each keeps what the other could use."""
    import torch

    torch.cuda.empty_cache()
    device.xp.get_default_memory_pool().free_all_blocks()
