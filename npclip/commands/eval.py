"""npclip eval."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from ..clip import CLIP, load
from ..errors import InputError
from ..evaluation.confusion_picture import check_picture, write_picture
from ..evaluation.image_folder import ImageFolder, splits
from ..evaluation.probe import Probe, probe_images, require_sklearn
from ..evaluation.zero_shot import ClassResult, Evaluation, Interval, evaluate
from . import add_model, printable

ABOUT = "How often a model is right about images in a folder for each class."
LISTED = 20  # unreadable images on stderr
WIDEST_LABEL = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    about = "a folder with a folder of images for each class, or train/ and test/ of such folders"
    parser.add_argument("folder", metavar="DIR", help=about)
    add_model(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    about = "what folders are called: JSON {folder: label or [label, synonym, ...]}, or lines of "
    parser.add_argument("--labels", metavar="FILE", help=about + "folder, tab, label")
    about = "prompts, one a line, in which {} is the label (default: built-in ones)"
    parser.add_argument("--templates", metavar="FILE", help=about)
    parser.add_argument("--confusion", metavar="PICTURE", help="write the confusion matrix as PNG")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    about = "train a linear classifier on the image features instead of comparing with labels"
    parser.add_argument("--linear-probe", action="store_true", help=about)
    parser.add_argument("--train", metavar="DIR", help="images to train it on; DIR tests it")
    about = "of the split, where there is none (default 0)"
    parser.add_argument("--seed", type=int, default=0, help=about)


def run(args: argparse.Namespace) -> str:
    """Accuracies, then a line for each class, the worst first; or all of it as JSON."""
    if args.train and not args.linear_probe:
        args.usage_error("--train is for --linear-probe")
    if args.templates and args.linear_probe:
        args.usage_error("--templates are not for --linear-probe, which compares with no label")
    if args.confusion:
        check_picture(args.confusion)
    report, evaluation, lines = _probe(args) if args.linear_probe else _zero_shot(args)
    _list_unreadable(evaluation)
    if args.confusion:
        write_picture(evaluation, args.confusion)
    if args.json:
        return json.dumps({**report, **evaluation.as_dict()})
    columns = shutil.get_terminal_size((100, 24)).columns
    return "\n".join([*lines, *_summary(evaluation), "", *_table(evaluation, columns)])


def _zero_shot(args: argparse.Namespace) -> tuple[dict[str, Any], Evaluation, list[str]]:
    folder = _open(splits(args.folder).get("test", args.folder), args.labels)
    model = load(args.model, args.device, args.dtype, activation=args.activation)
    evaluation = evaluate(model, _watched(folder), folder.labels, args.templates)
    report = {
        "method": "zero-shot",
        "folder": folder.path,
        "templates": args.templates or "built in",
        **_made_by(model, True),
    }
    return report, evaluation, [f"zero-shot: {args.model} on {folder.path}"]


def _probe(args: argparse.Namespace) -> tuple[dict[str, Any], Evaluation, list[str]]:
    require_sklearn()
    paths = {"train": args.train, "test": args.folder} if args.train else splits(args.folder)
    folders = {name: _open(path, args.labels) for name, path in paths.items()}
    folders = folders or {"all": _open(args.folder, args.labels)}
    _check_classes(folders)
    options = {"towers": ("image",), "activation": args.activation}
    model = load(args.model, args.device, args.dtype, **options)
    probe = probe_images(model, {k: _watched(v) for k, v in folders.items()}, args.seed)
    report = {
        "method": "linear probe",
        "folders": {name: folder.path for name, folder in folders.items()},
        "C": probe.C,
        "sweep": [{"C": C, "accuracy": found} for C, found in probe.sweep.items()],
        "not_converged": probe.not_converged,
        "converged": probe.converged,
        "trained": probe.trained,
        "validated": probe.validated,
        "seed": args.seed,
        **_made_by(model, False),
    }
    return report, probe.evaluation, list(_about(probe, folders, args.seed))


def _check_classes(folders: dict[str, ImageFolder]) -> None:
    """What linear_probe() would say of them after all the work."""
    train = folders.get("train") or folders["all"]
    if len(train.folders) < 2:
        raise InputError(f"one class only in {train.path}: nothing to tell it from")
    for folder in folders.values():
        if unknown := sorted(set(folder.folders) - set(train.folders)):
            raise InputError(
                f"{len(unknown)} folders of {folder.path} are not in {train.path}, among them "
                f"{unknown[0]!r}"
            )


def _about(probe: Probe, folders: dict[str, ImageFolder], seed: int) -> Iterator[str]:
    """Where the probe comes from."""
    given = ", ".join(f"{name} {folder.path}" for name, folder in folders.items() if name != "all")
    drawn = f"a fifth of {folders['all'].path}, seed {seed}" if "all" in folders else ""
    yield f"linear probe: {given or 'test: ' + drawn}"
    validation = "val" if "val" in folders else f"a fifth of the training images, seed {seed}"
    yield (
        f"trained on {probe.trained} images; C = {probe.C:.3g}, "
        f"the best of {len(probe.sweep)} on {probe.validated} of them: {validation}"
    )
    if probe.not_converged:
        found = f"{len(probe.not_converged)} of {len(probe.sweep)} fits"
        yield f"not converged after the largest number of steps: {found} of the search for C"
    if not probe.converged:
        yield "not converged after the largest number of steps: the final fit"


def _summary(evaluation: Evaluation) -> Iterator[str]:
    classes = f"{evaluation.images} images, {len(evaluation.labels)} classes"
    if empty := sum(not result.images for result in evaluation.per_class):
        classes += f", {empty} of them without images"
    yield classes
    if evaluation.unreadable:
        yield f"{len(evaluation.unreadable)} unreadable images are in no figure"
    yield ""
    yield _accuracy("top-1", evaluation.top1, evaluation.top1_interval)
    if evaluation.top5 is not None and evaluation.top5_interval is not None:
        yield _accuracy("top-5", evaluation.top5, evaluation.top5_interval)
    yield f"{'mean of classes':<15}  {evaluation.mean_per_class:8.2%}"


def _accuracy(name: str, share: float, interval: Interval) -> str:
    low, high = interval
    return f"{name:<15}  {share:8.2%}  {low:.2%} .. {high:.2%} (95 %, Wilson)"


def _table(evaluation: Evaluation, columns: int) -> Iterator[str]:
    """A line for each class, at most so wide where labels can be cut."""
    from ftfy.formatting import display_ljust

    has_top5 = evaluation.top5 is not None
    results = sorted(
        evaluation.per_class,
        key=lambda r: (r.top1 is None, r.top1 or 0.0, -r.images, r.label),
    )
    numbers = 8 + 9 + 9 * has_top5
    half = max(12, min(WIDEST_LABEL, (columns - numbers - 10) // 2))
    names = [_fitted(r.label, half) for r in results]
    width = max(map(_width, ["class", *names]))
    head = f"{display_ljust('class', width)}{'images':>8}{'top-1':>9}"
    yield head + f"{'top-5':>9}" * has_top5 + "  most often taken for"
    for name, result in zip(names, results, strict=True):
        line = f"{display_ljust(name, width)}{result.images:>8}{_percent(result.top1):>9}"
        line += f"{_percent(result.top5):>9}" * has_top5
        yield (line + _mistake(result, half)).rstrip()


def _mistake(result: ClassResult, width: int) -> str:
    if result.confused_with is None:
        return ""
    return f"  {_fitted(result.confused_with, width)} ({result.confused})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _fitted(label: str, width: int) -> str:
    """At most so many columns of a terminal, without what would move its cursor."""
    text = printable(label)
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _width(text: str) -> int:
    from ftfy.formatting import monospaced_width

    return int(monospaced_width(text))


def _open(path: str, labels: str | None) -> ImageFolder:
    folder = ImageFolder(path, labels)
    if folder.beside:
        print(f"npclip: {folder.beside} files beside the folders of {path}", file=sys.stderr)
    return folder


def _made_by(model: CLIP, normalized: bool) -> dict[str, Any]:
    return {"provenance": model.provenance(normalized).as_dict()}


def _list_unreadable(evaluation: Evaluation) -> None:
    for path, reason in evaluation.unreadable[:LISTED]:
        print(f"npclip: unreadable: {path}: {' '.join(reason.split())}", file=sys.stderr)
    if (more := len(evaluation.unreadable) - LISTED) > 0:
        print(f"npclip: {more} more unreadable: see --json", file=sys.stderr)


def _watched(images: ImageFolder) -> Iterator[Any]:
    """With a progress bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(images, unit=" images", leave=False, disable=None)
