"""Every error that npclip raises on purpose. All derive from NpclipError and from the built-in type
that openai/CLIP (or Python) raises in the same place, so either can be caught."""


class NpclipError(Exception):
    """Base of every error below."""


class ModelNotFoundError(NpclipError, RuntimeError):
    """The name is neither a known model nor an existing path."""


class DownloadError(NpclipError, RuntimeError):
    """A checkpoint could not be downloaded or did not match its SHA-256."""


class CheckpointError(NpclipError, ValueError):
    """A checkpoint file is unreadable, corrupt, unsafe, or not a CLIP model."""


class UnknownActivationError(CheckpointError):
    """Nothing in the checkpoint says whether it was trained with QuickGELU or GELU."""


class BackendError(NpclipError, RuntimeError):
    """The device or dtype asked for, or a package that it takes, is not available here."""


class ImageError(NpclipError, ValueError):
    """An image cannot be read, decoded or used."""


class InputError(NpclipError, ValueError):
    """An array has the wrong shape, dtype or values."""


class InputTypeError(NpclipError, TypeError):
    """An argument is of a type that means nothing here."""


class TextTooLongError(NpclipError, RuntimeError):
    """A text has more tokens than the model's context holds."""


class ProvenanceError(NpclipError, ValueError):
    """Embeddings that were made by different models, or in different ways."""


class StoreError(NpclipError, RuntimeError):
    """A collection of embeddings is broken, cannot be read or written, or has another writer."""


class TrainingError(NpclipError, RuntimeError):
    """Training cannot go on: a NaN or infinite loss or gradient, or a broken saved state."""
