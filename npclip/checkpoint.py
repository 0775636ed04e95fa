"""Opens any CLIP checkpoint without torch: its tensors under openai/CLIP's names, and its Metadata.

file or directory -> reader (safetensors_file, torch_file) -> key_names -> Checkpoint
                             config files beside it -> metadata_files -> Metadata
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import Config, Metadata, image_resolution, tensor_shapes
from .errors import CheckpointError
from .key_names import is_hugging_face, strip_wrappers, to_openai
from .metadata_files import hugging_face_metadata, open_clip_metadata, read_json
from .safetensors_file import read_safetensors
from .tensor import FLOATS, MappedFile, Tensor
from .torch_file import LEGACY, read_torch

__all__ = ["Checkpoint", "Tensor", "check_tensors", "open_checkpoint", "towers_of"]

# The weights that a directory may hold, in the order of preference; open_clip's first, because
# some repositories keep a bare image tower in model.safetensors beside it.
WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_SHARDS = 1000
OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass
class Checkpoint:
    """A CLIP model on disk. Nothing but headers has been read until a tensor is."""

    path: Path  # the file, or the index of several
    format: str  # a phrase such as "OpenAI TorchScript" or "Hugging Face safetensors"
    tensors: dict[str, Tensor]  # by openai/CLIP's names
    metadata: Metadata
    files: list[MappedFile]

    def release(self) -> None:
        """Let go of the file's pages in memory: call it after each tensor that was copied."""
        for file in self.files:
            file.release()

    def sha256(self) -> str:
        """The hexadecimal SHA-256 of the file; of several, of their bytes one after another."""
        return sha256(file.path for file in self.files)


def sha256(paths: Iterable[str | Path]) -> str:
    """The hexadecimal SHA-256 of files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .safetensors, .pt, .pth or .bin file (told apart by content), or the directory of a
    Hugging Face or open_clip model; sharded models by their directory or index file.

    Config files beside the weights are used. metadata.activation is None where nothing records it.
    Raises CheckpointError, naming the file, for anything unreadable, corrupt, unsafe or not CLIP.
    """
    path = Path(path)
    try:
        return _open(_find_weights(path) if path.is_dir() else path)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def towers_of(config: Config) -> list[str]:
    """The towers that the model has: "image", "text" or both."""
    widths = {"image": config.vision_width, "text": config.transformer_width}
    return [tower for tower, width in widths.items() if width]


def check_tensors(tensors: Mapping[str, Tensor], config: Config, towers: Iterable[str]) -> None:
    """Raise CheckpointError unless every tensor of these towers is there with its shape, all hold
    floating-point numbers, and none is left over that the whole model does not have.

    logit_scale may be missing where the model has one tower only.
    """
    present = towers_of(config)
    towers = list(towers)
    for tower in towers:
        if tower not in present:
            raise CheckpointError(f"the checkpoint has no {tower} tower")
    known, wanted = tensor_shapes(config, present), tensor_shapes(config, towers)
    if len(present) < 2 and "logit_scale" not in tensors:
        del wanted["logit_scale"]
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unexpected := [name for name in tensors if name not in known]:
        raise CheckpointError(
            f"{len(unexpected)} tensors do not belong to CLIP: {_some(unexpected)}"
        )
    for name, shape in wanted.items():
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(found.shape)} where {list(shape)} is wanted"
            )
        if found.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} holds {found.dtype}, not floating-point numbers")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _find_weights(directory: Path) -> Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(f"the directory holds no checkpoint; looked for {', '.join(WEIGHTS)}")


def _open(path: Path) -> Checkpoint:
    parts = _shards(path) if path.name.endswith(".index.json") else [path]
    tensors: dict[str, Tensor] = {}
    files, strings, containers, activation = [], dict[str, str](), set(), None
    for part in parts:
        try:
            file = MappedFile(part)
            container = _container(file)
            if container == "safetensors":
                found, strings = read_safetensors(file)
            else:
                torch_file = read_torch(file)
                found, container = torch_file.tensors, torch_file.kind
                activation = torch_file.activation
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from error
        if twice := [name for name in found if name in tensors]:
            raise CheckpointError(f"{part}: tensor {twice[0]} is also in another shard")
        tensors |= found
        files.append(file)
        containers.add(container)
    tensors = strip_wrappers(tensors)
    hugging_face = is_hugging_face(tensors)
    tensors = to_openai(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout = "Hugging Face" if hugging_face else "OpenAI"
    config = path.parent / OPEN_CLIP_CONFIG
    if strings.get("format") == "npclip":
        layout, metadata = "npclip", Metadata.from_strings(strings)
    elif hugging_face:
        metadata = hugging_face_metadata(path.parent, image_resolution(shapes))
    elif activation is None and config.is_file():
        layout, metadata = "open_clip", open_clip_metadata(config, image_resolution(shapes))
    else:
        metadata = Metadata(activation=activation)
    kind = f"{layout} {' and '.join(sorted(containers))}"
    checkpoint = Checkpoint(path, kind, tensors, metadata, files)
    if metadata.activation is None and _is_openai_download(checkpoint):
        checkpoint.metadata = dataclasses.replace(metadata, activation="quick_gelu")
    return checkpoint


def _is_openai_download(checkpoint: Checkpoint) -> bool:
    from .hub import MODELS

    known = {model.filename: model.sha256 for model in MODELS.values()}
    name = checkpoint.path.name
    return name in known and checkpoint.sha256() == known[name]


def _shards(index: Path) -> list[Path]:
    """The files that an index of tensor name -> file name refers to; all in its own directory."""
    weights = read_json(index).section("weight_map")
    names = {weights.get(key, str, "") for key in weights.values}
    if not names or len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: weight_map refers to {len(names)} files")
    for name in names:
        if not name or name in (".", "..") or set(name) & set("/\\:\0"):
            raise weights.error("", f"refers to {name[:100]!r}, which is not a plain file name")
    return [index.with_name(name) for name in sorted(names)]


def _container(file: MappedFile) -> str:
    """ "safetensors" or "torch", by how the file begins."""
    start = file.map[:512]
    if start[:4] == b"PK\3\4":
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    raise CheckpointError(_diagnosis(start))


def _diagnosis(start: bytes) -> str:
    if start.startswith(LEGACY):
        return (
            "written by torch < 1.6 (or with _use_new_zipfile_serialization=False): "
            "load it with a current torch and torch.save its state_dict again"
        )
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the checkpoint itself: fetch it with `git lfs pull`"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "an HTML or XML page, not a checkpoint: the download went wrong"
    if start[:1] == b"\x80":
        return "a bare pickle, which no current torch writes; nothing in it was executed"
    return f"neither a safetensors nor a torch file: it begins with {start[:16]!r}"
