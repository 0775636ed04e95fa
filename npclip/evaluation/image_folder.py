"""A folder of images for each class, and what the classes are called."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from ..errors import InputError, InputTypeError
from ..sources import Item, open_sources
from ..zeroshot import Label

Names: TypeAlias = "str | os.PathLike[str] | Mapping[str, Label]"
SPLITS = ("train", "val", "test")


class ImageFolder:
    """PATH/CLASS/.../IMAGE: iterates over (Item, name of its label), sorted, reading lazily.

    folders: the names of the class folders [L]; labels: the label of each [L]; beside: how many
    files lie in PATH itself, and so in no class.
    """

    def __init__(self, path: str | os.PathLike[str], names: Names | None = None) -> None:
        """Finds the classes. A folder without images is one too: a label to choose wrongly.

        names: the label of each folder, {folder: label or sequence of synonyms}, or the path of a
            file with them, as read_names() reads it. A folder that is not in it is called by its
            own name, with spaces for "_" and "-".

        Raises InputError where there is no class folder, no image, a name that two folders share,
        or no folder that names has; InputTypeError for other names; also what read_names() raises.
        """
        self.path = os.fspath(path)
        known = _known(names)
        try:
            entries = [e for e in os.scandir(self.path) if not e.name.startswith(".")]
        except OSError as error:
            raise InputError(f"cannot read the folder {self.path}: {error.strerror}") from error
        self.folders = sorted(entry.name for entry in entries if entry.is_dir())
        self.beside = len(entries) - len(self.folders)
        if not self.folders:
            raise InputError(f"{self.path} has no folders: images lie in a folder for each class")
        if known and not set(known) & set(self.folders):
            raise InputError(
                f"no folder of {self.path} is among the {len(known)} that labels are given for; "
                f"one of them is {next(iter(known))!r}, one of the folders {self.folders[0]!r}"
            )
        self.labels: list[Label] = [known.get(name, _spoken(name)) for name in self.folders]
        self._names = dict(zip(self.folders, map(_first, self.labels), strict=True))
        self._check_names()
        if next(iter(self), None) is None:
            raise InputError(f"no images in the folders of {self.path}")

    def __iter__(self) -> Iterator[tuple[Item, str]]:
        """Every image of every class folder, and the name of its label."""
        root = PurePosixPath(os.path.normpath(self.path).replace(os.sep, "/"))
        # As sources of their own: links to folders are followed then.
        folders = [os.path.join(self.path, name) for name in self.folders]
        for item in open_sources(folders, "image"):
            folder = PurePosixPath(item.id).relative_to(root).parts[0]
            yield item, self._names[folder]

    def _check_names(self) -> None:
        """Names that differ in case or spaces only are the same to the tokenizer."""
        seen: dict[str, str] = {}
        for folder, name in self._names.items():
            plain = " ".join(name.lower().split())
            if not plain:
                raise InputError(f"the name of the folder {folder!r} is no label: give it one")
            if plain in seen:
                raise InputError(
                    f"the folders {seen[plain]!r} and {folder!r} have the same label, {name!r}: "
                    "give one of them another"
                )
            seen[plain] = folder


def read_names(path: str | os.PathLike[str]) -> dict[str, Label]:
    """The labels of folders: a JSON object {folder: label or [label, synonym, ...]}, or lines of
    text, each a folder and its label and any synonyms, separated by tabs.

    Raises InputError, with the line where there is one, for a file that is neither.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read labels from {path}: {error}") from error
    is_json = os.fspath(path).lower().endswith(".json") or text.lstrip().startswith("{")
    found = _of_json(text, path) if is_json else _of_lines(text, path)
    if not found:
        raise InputError(f"{path}: no labels")
    return found


def splits(path: str | os.PathLike[str]) -> dict[str, str]:
    """Where the folders of a data set's splits are, if PATH has train/ and test/, or train/ and
    val/, and no folder beside them: {"train": ..., "test": ...} and perhaps "val"; else {}.

    Without test/, val/ is what is tested on, as usual for ImageNet.
    """
    root = Path(path)
    try:
        found = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    except OSError:  # which ImageFolder tells of
        return {}
    if "train" not in found or len(found) < 2 or not found <= set(SPLITS):
        return {}
    split = {name: str(root / name) for name in SPLITS if name in found}
    if "test" not in split:
        split["test"] = split.pop("val")
    return split


def _known(names: Names | None) -> dict[str, Label]:
    if isinstance(names, (str, os.PathLike)):
        return read_names(names)
    if not isinstance(names, (Mapping, type(None))):
        raise InputTypeError(f"labels of folders must be a mapping or a file, not {names!r:.80}")
    found = dict(names or {})
    _check_labels(found)
    return found


def _check_labels(labels: Mapping[str, Any]) -> None:
    for folder, label in labels.items():
        names = label if isinstance(label, (list, tuple)) else [label]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise InputError(f"the label of the folder {folder!r} is no text: {label!r:.80}")


def _spoken(folder: str) -> str:
    """A folder's name as a label; bytes of it that are not UTF-8 become U+FFFD."""
    name = os.fsencode(folder).decode("utf-8", "replace")
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def _first(label: Label) -> str:
    return label if isinstance(label, str) else label[0]


def _of_json(text: str, path: Any) -> dict[str, Label]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_unique(Counter(folder for folder, _ in pairs), path)
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object of labels by folder expected")
    try:
        _check_labels(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def _of_lines(text: str, path: Any) -> dict[str, Label]:
    found: list[tuple[str, Label]] = []
    for number, line in enumerate(text.splitlines(), 1):
        folder, *names = [part.strip() for part in line.split("\t")]
        if not line.strip():
            continue
        if not folder or not names or not all(names):
            raise InputError(
                f"{path}, line {number}: not a folder, a tab and a label: {line!r:.80}"
            )
        found.append((folder, names if len(names) > 1 else names[0]))
    _check_unique(Counter(folder for folder, _ in found), path)
    return dict(found)


def _check_unique(counts: Counter[str], path: Any) -> None:
    if twice := [folder for folder, count in counts.items() if count > 1]:
        raise InputError(f"{path}: the folder {twice[0]!r} is given twice")
