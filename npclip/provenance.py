"""What an embedding was made by: two are comparable only where that is the same."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import sha256
from .config import Metadata
from .errors import CheckpointError, ProvenanceError

CALLED = {  # in the sentences of differences()
    "weights_sha256": "SHA-256 of the weights",
    "dtype": "dtype",
    "preprocessing": "preprocessing",
    "normalized": "normalisation to length 1",
    "dimension": "length of an embedding",
}
FAST_DECODE = ", JPEGs decoded at a reduced size"


@dataclass(frozen=True)
class Provenance:
    """Of embeddings. What is told apart: all but the names, of the model and of the version."""

    model: str  # of available_models(), or of the checkpoint's file
    weights_sha256: str  # of the checkpoint; of a converted one, that of its source
    dtype: str  # of the model: what load() was given
    preprocessing: str  # of images: preprocessing()
    normalized: bool  # to length 1
    dimension: int
    npclip: str  # version

    def differences(self, other: Provenance) -> list[str]:
        """Why embeddings of the two must not be compared, one sentence each; [] where they may."""
        found = []
        for field, name in CALLED.items():
            mine, others = getattr(self, field), getattr(other, field)
            if mine != others:
                found.append(f"{name}: {mine} here, {others} there")
        if found and self.model != other.model:
            found.insert(0, f"model: {self.model} here, {other.model} there")
        return found

    def check(self, other: Provenance, what: str) -> None:
        """Raises ProvenanceError, with all differences, where there is one. what: of the other."""
        if found := self.differences(other):
            raise ProvenanceError(f"{what} has other embeddings: {'; '.join(found)}")

    @property
    def fast_decode(self) -> bool:
        """Whether large JPEGs were decoded at a reduced size, as embed(fast_decode=True) does."""
        return self.preprocessing.endswith(FAST_DECODE)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse. Raises ProvenanceError where a field is missing or of another type."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = values.get(field.name)
            if type(value).__name__ != field.type:
                raise ProvenanceError(f"provenance without {field.name}, or a wrong one: {value!r}")
            found[field.name] = value
        return cls(**found)


@dataclass(frozen=True)
class Origin:
    """Where a model came from."""

    name: str
    files: tuple[Path, ...]  # absolute
    stamps: tuple[tuple[int, int], ...]  # their sizes and times of change, when they were read

    @classmethod
    def of(cls, name: str, paths: Iterable[Path]) -> Origin:
        """Of files that have just been read."""
        files = tuple(Path(os.path.abspath(path)) for path in paths)
        return cls(name, files, _stamps(files))

    def weights_sha256(self, metadata: Metadata) -> str:
        """Of the checkpoint's files, one after the other; of a converted one, its source's.

        Raises CheckpointError where they have changed since.
        """
        if metadata.source_sha256:
            return metadata.source_sha256
        try:
            if _stamps(self.files) == self.stamps:
                return sha256(self.files)
        except OSError as error:
            raise CheckpointError(f"{self.files[0]}: {error.strerror}") from error
        raise CheckpointError(f"{self.files[0]} has changed since it was loaded")


def _stamps(files: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    found = (file.stat() for file in files)
    return tuple((status.st_size, status.st_mtime_ns) for status in found)


def preprocessing(resolution: int, metadata: Metadata, fast_decode: bool = False) -> str:
    """How images become pixels, in words: equal where, and only where, the pixels are."""
    mean, std = (",".join(f"{v:.9g}" for v in values) for values in (metadata.mean, metadata.std))
    how = {"shortest": "shorter side, centre crop", "squash": "both sides"}[metadata.resize]
    rule = f"{resolution} px, {metadata.interpolation}, {how}, mean {mean}, std {std}"
    return rule + FAST_DECODE * fast_decode
