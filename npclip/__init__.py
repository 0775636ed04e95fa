"""CLIP from scratch on NumPy: OpenAI's exact embeddings without a framework.

import npclip
model = npclip.load("ViT-B/32")
model.classify("photo.jpg", ["cat", "dog"])
model.encode_image("photo.jpg"), model.encode_text("a photo of a cat")
"""

from .clip import CLIP, asnumpy, load, softmax
from .embedder import Embedder
from .errors import (
    BackendError,
    CheckpointError,
    DownloadError,
    ImageError,
    InputError,
    InputTypeError,
    ModelNotFoundError,
    NpclipError,
    ProvenanceError,
    StoreError,
    TextTooLongError,
    UnknownActivationError,
)
from .hub import available_models
from .provenance import Provenance
from .report import show_config
from .threads import get_num_threads, set_num_threads
from .tokenizer import tokenize
from .zeroshot import ZeroShot

__version__ = "0.1.0"
__all__ = [
    "CLIP",
    "BackendError",
    "CheckpointError",
    "DownloadError",
    "Embedder",
    "ImageError",
    "InputError",
    "InputTypeError",
    "ModelNotFoundError",
    "NpclipError",
    "Provenance",
    "ProvenanceError",
    "StoreError",
    "TextTooLongError",
    "UnknownActivationError",
    "ZeroShot",
    "asnumpy",
    "available_models",
    "get_num_threads",
    "load",
    "set_num_threads",
    "show_config",
    "softmax",
    "tokenize",
]
