"""load() and CLIP: the interface of openai/CLIP on arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from . import hub, inputs, ops
from .checkpoint import Checkpoint, open_checkpoint
from .config import Config, Metadata, infer_config
from .errors import CheckpointError, InputError, InputTypeError
from .inputs import ImageInput
from .model import encode_image, encode_text
from .ops import Parameters
from .params import load_parameters
from .preprocess import preprocess
from .provenance import Origin, Provenance, preprocessing
from .tokenizer import tokenize

if TYPE_CHECKING:
    from PIL.Image import Image

Float32: TypeAlias = NDArray[np.float32]
Method = TypeVar("Method", bound=Callable[..., Any])
TOWERS = ("image", "text")
# These bound the memory of a forward pass whatever the input's length.
PIXELS_PER_BATCH = {"cpu": 32 * 224 * 224, "cuda": 256 * 224 * 224}
MAX_IMAGES = 65535  # in a batch: the length of a grid of CUDA's blocks
TEXTS_PER_BATCH = {"cpu": 64, "cuda": 1024}


def load(
    name_or_path: str | os.PathLike[str],
    device: str | None = None,
    dtype: str | None = None,
    download_root: str | os.PathLike[str] | None = None,
    towers: Sequence[str] = TOWERS,
    activation: str | None = None,
) -> CLIP:
    """Load a CLIP model; the result also unpacks as `model, preprocess = load(...)`.

    name_or_path: a name of available_models(), downloaded once and verified, or "tiny", which comes
        with npclip (docs/tiny.md), or a path: OpenAI's .pt, a torch.save state_dict, safetensors,
        or a Hugging Face or open_clip directory.
    device: "cpu", "cuda" or "cuda:N"; by default "cuda" where CuPy and a usable GPU exist.
    dtype: by default "float32" on the CPU and "float16" on a GPU. On a GPU "float16", "bfloat16"
        and "float32" are how weights and activations are stored; sums are in float32, and
        embeddings are float32 CuPy arrays (npclip.asnumpy copies them to the host). On the CPU:
        "float32": exact for any stored dtype. Matrices that are stored in
        float16 stay so in memory, and are widened where they are used.
        "float16": matrices are kept in float16, the arithmetic is in float32: the bits of
        "float32" where the checkpoint stores float16, half the memory where it does not.
        "bfloat16": matrices, and what goes from one op to the next, are rounded to bfloat16; sums
        and the residual stream are float32. Without AVX512-BF16 the matrices only are rounded.
    download_root: cache directory instead of $NPCLIP_CACHE or ~/.cache/npclip.
    towers: ("image", "text") or one of them; the other's weights are not read.
    activation: "quick_gelu" or "gelu", for a checkpoint that does not record it.

    Raises ModelNotFoundError, DownloadError, CheckpointError (UnknownActivationError among them)
    and BackendError, all from npclip.errors.
    """
    towers = _check_towers(towers)
    device, dtype = ops.resolve(device, dtype)  # fails before anything is downloaded
    opened = open_model(name_or_path, download_root, activation)
    return load_opened(*opened, towers, device, dtype, os.fspath(name_or_path))


def open_model(
    name_or_path: str | os.PathLike[str],
    download_root: str | os.PathLike[str] | None = None,
    activation: str | None = None,
) -> tuple[Checkpoint, Config]:
    """The first half of load(): the checkpoint's tensors, not yet read, and what they make up."""
    name = os.fspath(name_or_path)
    checkpoint = open_checkpoint(hub.resolve(name, download_root))
    if name in hub.MODELS:
        activation = activation or "quick_gelu"  # as all of OpenAI's
    with _naming(checkpoint):
        if activation is not None:
            checkpoint.metadata = dataclasses.replace(checkpoint.metadata, activation=activation)
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        return checkpoint, infer_config(shapes, checkpoint.metadata)


def load_opened(
    checkpoint: Checkpoint,
    config: Config,
    towers: tuple[str, ...],
    device: str,
    dtype: str,
    name: str = "",
) -> CLIP:
    """The second half of load(): reads the weights. name: as load() was given it."""
    with _naming(checkpoint):
        params = load_parameters(checkpoint, config, towers, ops.keeps_float16(device))
        params = ops.prepare(params, dtype, checkpoint.release, device)
    name = name if name in hub.available_models() else checkpoint.path.name
    origin = Origin.of(name, (file.path for file in checkpoint.files))
    return CLIP(config, checkpoint.metadata, params, device, dtype, origin)


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Puts the file's path before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.path}: {error}") from None


def _check_towers(towers: Sequence[str]) -> tuple[str, ...]:
    towers = (towers,) if isinstance(towers, str) else tuple(towers)
    if not towers or set(towers) - set(TOWERS):
        raise InputError(f'towers must be ("image", "text") or one of them, not {towers!r}')
    return towers


@dataclass(frozen=True)
class Visual:
    """What openai/CLIP's users read from model.visual."""

    input_resolution: int
    output_dim: int


def _on_its_device(method: Method) -> Method:
    """The method of a CLIP, with the model's GPU as the current one."""

    @wraps(method)
    def call(self: CLIP, *args: Any, **kwargs: Any) -> Any:
        with self._towers.device.handle if self._towers else nullcontext():
            return method(self, *args, **kwargs)

    return cast("Method", call)


class CLIP:
    """A loaded model. Its methods change nothing, so threads may share it."""

    def __init__(
        self,
        config: Config,
        metadata: Metadata,
        params: Parameters,
        device: str = "cpu",
        dtype: str = "float32",
        origin: Origin | None = None,
    ) -> None:
        """Use load(); params are those of params.load_parameters."""
        self.config = config
        self.metadata = metadata
        self.device = device
        self.dtype = dtype
        self._params = params
        self._origin = origin
        self._towers = None
        if device != "cpu":
            from .cuda_towers import Towers

            self._towers = Towers(ops.open_device(device), params, config, metadata, dtype)

    def __iter__(self) -> Iterator[CLIP | Callable[..., Float32]]:
        """`model, preprocess = load(...)`"""
        return iter((self, self.preprocess))

    def __repr__(self) -> str:
        """One line: towers, sizes, device, dtype."""
        towers = "+".join(t for t in TOWERS if t in self._params)
        return f"CLIP({towers}, embed_dim={self.config.embed_dim}, {self.dtype}, {self.device})"

    @property
    def visual(self) -> Visual:
        """Of the image tower: input_resolution (pixels a side) and output_dim."""
        return Visual(self.config.image_resolution, self.config.embed_dim)

    @property
    def context_length(self) -> int:
        """Tokens a text may have, start and end included (77)."""
        return self.config.context_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids (49408): see tokenize for a model that has fewer."""
        return self.config.vocab_size

    @property
    def logit_scale(self) -> np.float32:
        """The learned temperature as stored: logits are exp(logit_scale) * cosine."""
        if (scale := self._params.get("logit_scale")) is None:
            raise InputError("this checkpoint has no logit_scale")
        return np.float32(scale)

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of the checkpoint file; of a converted one, that of its source.

        The file is read for it, at the first call. Raises InputError for a model that was not
        loaded from a file, CheckpointError where the file has changed since.
        """
        if self._origin is None:
            raise InputError("this model was not loaded from a file")
        return self._origin.weights_sha256(self.metadata)

    def provenance(self, normalized: bool = True, fast_decode: bool = False) -> Provenance:
        """What tells its embeddings from another model's.

        normalized, fast_decode: whether they are, and whether their images were decoded so.
        """
        from . import __version__

        return Provenance(
            model=self._origin.name if self._origin else "",
            weights_sha256=self.weights_sha256,
            dtype=self.dtype,
            preprocessing=preprocessing(self.config.image_resolution, self.metadata, fast_decode),
            normalized=normalized,
            dimension=self.config.embed_dim,
            npclip=__version__,
        )

    def preprocess(self, image: ImageInput | Image) -> Float32:
        """An image as the image tower takes it: resized, cropped, normalised.

        image: path, encoded bytes, PIL image, or uint8 RGB array [H, W, 3].
        Returns float32 [3, R, R], bit-identical to openai/CLIP's. Raises ImageError.
        """
        meta, size = self.metadata, self.config.image_resolution
        return preprocess(image, size, meta.mean, meta.std, meta.resize, meta.interpolation)

    @_on_its_device
    def encode_image(self, x: Any, normalize: bool = False) -> Float32:
        """Image embeddings, float32: one image gives [E], several [B, E], none [0, E].

        x: an image (path, encoded bytes, PIL image, uint8 RGB array [H, W, 3], or the float
            [3, R, R] that preprocess returns), a list or iterator of those, or float [B, 3, R, R].
            Arrays may be of any library with DLPack, on the host or an NVIDIA GPU.
            Iterators are consumed in batches, so memory stays bounded.
        normalize: divide each embedding by its L2 norm.

        Raises ImageError for an image that cannot be read, InputError for an array that cannot be
        one, InputTypeError for anything else.
        """
        resolution = self.config.image_resolution
        batch_size = min(max(1, PIXELS_PER_BATCH[self._kind] // resolution**2), MAX_IMAGES)
        params = self._tower("image")
        if self._towers and (on_device := self._towers.as_device_images(x)) is not None:
            batches, single = self._towers.image_batches(on_device, batch_size)
        else:
            batches, single = inputs.image_batches(x, self.preprocess, resolution, batch_size)
        on_host = partial(encode_image, p=params, config=self.config)
        encode = self._towers.encode_image if self._towers else on_host
        return self._encode(encode, batches, single, normalize)

    @_on_its_device
    def encode_text(self, x: Any, normalize: bool = False, truncate: bool = False) -> Float32:
        """Text embeddings, float32: one text gives [E], several [B, E], none [0, E].

        x: str, a list or iterator of str, or token ids (integers [B, 77] or [77], on the host or
            an NVIDIA GPU).
        normalize: divide each embedding by its L2 norm.
        truncate: cut texts of more than context_length tokens instead of raising
            TextTooLongError.

        Raises InputError for token ids of a wrong shape, dtype or range, InputTypeError for other
        types.
        """
        length, vocab = self.context_length, self.vocab_size
        to_ids = partial(tokenize, context_length=length, truncate=truncate, vocab_size=vocab)
        batch_size = TEXTS_PER_BATCH[self._kind]
        batches, single = inputs.text_batches(x, to_ids, length, vocab, batch_size)
        on_host = partial(encode_text, p=self._tower("text"), config=self.config)
        encode = self._towers.encode_text if self._towers else on_host
        return self._encode(encode, batches, single, normalize)

    @_on_its_device
    def __call__(self, image: Any, text: Any) -> tuple[Float32, Float32]:
        """logits_per_image [I, T] and logits_per_text [T, I]: exp(logit_scale) * cosine.

        image and text as in encode_image and encode_text; one input counts as a batch of one.
        """
        images = np.atleast_2d(self.encode_image(image, normalize=True))
        texts = np.atleast_2d(self.encode_text(text, normalize=True))
        logits_per_image = np.exp(self.logit_scale) * images @ texts.T
        return logits_per_image, logits_per_image.T

    @_on_its_device
    def classify(
        self, image: Any, labels: Iterable[str], template: str = "a photo of a {}."
    ) -> Float32:
        """Zero-shot probabilities of the labels: [L] for one image, [B, L] for several.

        image: as in encode_image. template: the prompt, in which {} stands for the label.

        Raises InputTypeError for a label or template that is not a str, InputError for a template
        without {} or no label at all.
        """
        prompts = _prompts(labels, template)
        images = self.encode_image(image, normalize=True)
        texts = self.encode_text(prompts, normalize=True)
        return softmax(np.exp(self.logit_scale) * images @ texts.T)

    @property
    def _kind(self) -> str:
        return self.device.partition(":")[0]

    def _tower(self, name: str) -> Parameters:
        if name not in self._params:
            raise InputError(f"the {name} tower was not loaded: add it to load(towers=...)")
        return self._params[name]

    def _encode(
        self,
        encode: Callable[[NDArray[Any]], Float32],
        batches: Iterable[NDArray[Any]],
        single: bool,
        normalize: bool,
    ) -> Float32:
        features = [encode(batch) for batch in batches]
        if not features:
            nothing = np.empty((0, self.config.embed_dim), np.float32)
            features = [self._towers.device.asarray(nothing) if self._towers else nothing]
        result = features[0] if len(features) == 1 else np.concatenate(features)
        result = ops.l2_normalize(result) if normalize else result
        return result[0] if single else result


def _prompts(labels: Iterable[str], template: str) -> list[str]:
    """The template with each label in the place of its {}."""
    if not isinstance(template, str):
        raise InputTypeError(f"the template must be a str, not {type(template).__name__}")
    if "{}" not in template:
        raise InputError(f"the template {template!r} has no {{}} for the label")
    if not isinstance(labels, Iterable):
        raise InputTypeError(f"labels must be a list of str, not {type(labels).__name__}")
    labels = [] if isinstance(labels, str) else list(labels)
    if not labels:
        raise InputError("labels must be a list of at least one str")
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise InputTypeError(f"label {index} must be a str, not {type(label).__name__}")
    return [template.replace("{}", label) for label in labels]


def asnumpy(x: Any) -> NDArray[Any]:
    """A NumPy array of what encode_image and others return, wherever it lies."""
    if not ops.is_device_array(x):
        return np.asarray(x)
    return ops.open_device(f"cuda:{x.device.id}").asnumpy(x)


def softmax(x: Any) -> Float32:
    """exp(x) / sum exp(x) along the last axis, of any array-like; float32 unless x is float64.

    Raises InputError where there is no last axis or nothing on it.
    """
    on_device = ops.is_device_array(x)
    x = x if on_device else np.asarray(x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"softmax needs at least one value, not an array {list(x.shape)}")
    with x.device if on_device else nullcontext():
        return ops.softmax(x if x.dtype in (np.float32, np.float64) else x.astype(np.float32))
