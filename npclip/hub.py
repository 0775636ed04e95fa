"""Checkpoints by name: OpenAI's, how to get them whole and where they are kept, and npclip's own.

A file under its final name in the cache is complete and was verified once; a download lives in
`<file>.part` until its SHA-256 is right. `<file>.verified` remembers the size and time of the file
that was hashed, so that later loads need not read it again.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DownloadError, ModelNotFoundError

BASE_URL = "https://openaipublic.azureedge.net/clip/models"
TIMEOUT = 30.0  # seconds without a byte before a connection counts as stalled
RETRIES = 4  # attempts in a row that bring nothing new
BACKOFF = 0.5  # seconds before the first retry; doubles
CHUNK = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """One checkpoint on OpenAI's server; size_mib is for people, sha256 is the contract."""

    filename: str
    sha256: str
    size_mib: int

    @property
    def url(self) -> str:
        """On the mirror that $NPCLIP_MIRROR names, else on OpenAI's server."""
        base = os.environ.get("NPCLIP_MIRROR") or BASE_URL
        return f"{base.rstrip('/')}/{self.sha256}/{self.filename}"


MODELS: dict[str, RemoteFile] = {
    name: RemoteFile(filename, sha256, size_mib)
    for name, filename, sha256, size_mib in (
        ("RN50", "RN50.pt",
         "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", 244),
        ("RN101", "RN101.pt",
         "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", 278),
        ("RN50x4", "RN50x4.pt",
         "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", 402),
        ("RN50x16", "RN50x16.pt",
         "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", 631),
        ("RN50x64", "RN50x64.pt",
         "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", 1291),
        ("ViT-B/32", "ViT-B-32.pt",
         "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", 338),
        ("ViT-B/16", "ViT-B-16.pt",
         "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", 335),
        ("ViT-L/14", "ViT-L-14.pt",
         "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", 890),
        ("ViT-L/14@336px", "ViT-L-14-336px.pt",
         "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 891),
    )
}  # fmt: skip
BUNDLED = {"tiny": Path(__file__).with_name("tiny.safetensors")}  # in this package


def available_models() -> list[str]:
    """The names that load() knows: OpenAI's models, and "tiny", which comes with npclip."""
    return [*MODELS, *BUNDLED]


def resolve(
    name_or_path: str | os.PathLike[str], download_root: str | os.PathLike[str] | None = None
) -> Path:
    """The checkpoint of a name, downloaded if need be and verified, or else an existing path.

    A bundled one lies in this package. OpenAI's are looked for in download_root, $NPCLIP_CACHE or
    ~/.cache/npclip, then (read only) in ~/.cache/clip, where openai/CLIP keeps the same files.
    Raises ModelNotFoundError, DownloadError.
    """
    name = os.fspath(name_or_path)
    if name in MODELS:
        return _fetch(MODELS[name], cache_directory(download_root))
    if name in BUNDLED:
        return BUNDLED[name]
    try:
        if name and Path(name).exists():
            return Path(name)
    except OSError as error:  # a name too long, a directory that may not be read
        raise ModelNotFoundError(f"{name!r}: {error.strerror or error}") from error
    raise ModelNotFoundError(f"{name!r} is neither a file nor a model name{_suggestion(name)}")


def cache_directory(download_root: str | os.PathLike[str] | None = None) -> Path:
    """Where downloads are kept: download_root, $NPCLIP_CACHE, or npclip in the user's cache.

    Raises DownloadError where that is in the home directory and there is none.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "npclip"
    directory = Path(download_root or os.environ.get("NPCLIP_CACHE") or default)
    try:
        return directory.expanduser()
    except RuntimeError as error:
        raise DownloadError(f"{directory}: {error} Set NPCLIP_CACHE to a directory") from error


def _suggestion(name: str) -> str:
    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    names = available_models()
    close = [known for known in names if plain(known).removesuffix("px") == plain(name)]
    close += [known for known in names if plain(known) == plain(name.removesuffix(".pt"))]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (names: {', '.join(names)})"


def _fetch(file: RemoteFile, directory: Path) -> Path:
    from filelock import FileLock

    path = directory / file.filename
    if _is_verified(path, file):
        return path
    try:
        if not path.exists() and (shared := _shared(file)):
            return shared
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # held by the OS: a killed process lets go of it
            if path.exists() and not _is_verified(path, file):
                _check_existing(path, file)
            if not path.exists():
                _download(file, path)
    except OSError as error:
        if _is_right(path, file):  # in a cache that may only be read
            return path
        raise DownloadError(f"{error.strerror or error}. {_by_hand(file, path)}") from error
    return path


def _shared(file: RemoteFile) -> Path | None:
    """openai/CLIP's copy of the file, where there is a right one."""
    try:
        path = Path("~/.cache/clip").expanduser() / file.filename
    except RuntimeError:  # no home directory
        return None
    return path if _is_right(path, file) else None


def _is_right(path: Path, file: RemoteFile) -> bool:
    try:
        return _sha256(path) == file.sha256
    except OSError:
        return False


def _check_existing(path: Path, file: RemoteFile) -> None:
    """Hash a file whose verification is not on record; move a wrong one out of the way."""
    found = _sha256(path)
    if found == file.sha256:
        _record(path, file)
        return
    if _offline():
        raise DownloadError(f"{path} has SHA-256 {found}. {_by_hand(file, path)}")
    os.replace(path, f"{path}.wrong")


def _verification(path: Path, file: RemoteFile) -> bytes:
    stat = path.stat()
    return f"{file.sha256} {stat.st_size} {stat.st_mtime_ns}".encode()


def _is_verified(path: Path, file: RemoteFile) -> bool:
    try:
        return Path(f"{path}.verified").read_bytes() == _verification(path, file)
    except OSError:
        return False


def _record(path: Path, file: RemoteFile) -> None:
    with suppress(OSError):  # it only saves time
        Path(f"{path}.verified").write_bytes(_verification(path, file))


def _sha256(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _offline() -> bool:
    return os.environ.get("NPCLIP_OFFLINE", "") not in ("", "0")


def _by_hand(file: RemoteFile, path: Path) -> str:
    return (
        f"Wanted: {file.filename}, {file.size_mib} MiB, SHA-256 {file.sha256}, from {file.url}. "
        f"Put it at {path}, or set NPCLIP_MIRROR to a URL that holds <sha256>/<file>, "
        "or NPCLIP_CACHE to a directory that holds the file"
    )


def _download(file: RemoteFile, path: Path) -> None:
    """Bring the file to path, resuming what an earlier attempt left; path is complete or absent."""
    if _offline():
        raise DownloadError(f"NPCLIP_OFFLINE is set. {_by_hand(file, path)}")
    part = Path(f"{path}.part")
    for attempts_left in (2, 1, 0) if part.exists() else (1, 0):
        _transfer(file, path, part)
        found = _sha256(part)
        if found == file.sha256:
            with open(part, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(part, path)
            _record(path, file)
            return
        part.unlink()  # wrong from the first byte or somewhere: once more, from the start
        if not attempts_left:
            raise DownloadError(f"the server's file has SHA-256 {found}. {_by_hand(file, path)}")


def _transfer(file: RemoteFile, path: Path, part: Path) -> None:
    """All bytes into part, over as many connections as it takes while each brings more."""
    from http.client import HTTPException, InvalidURL
    from urllib.error import HTTPError

    failures, error = 0, ""
    while failures < RETRIES:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer_once(file, part, before):
                return
            error = "the connection was cut"
        except HTTPError as http:
            error = f"HTTP {http.code} {http.reason}"
            http.close()
            if http.code == 416:  # nothing beyond what part holds: complete, or not this file
                if before and _sha256(part) == file.sha256:
                    return
                part.unlink(missing_ok=True)
            elif http.code < 500 and http.code not in (408, 429):
                break
        except (InvalidURL, ValueError) as reason:  # NPCLIP_MIRROR is no URL
            error = f"invalid URL: {reason}"
            break
        except (OSError, HTTPException) as reason:  # URLError and time-outs are OSErrors
            if isinstance(reason, OSError) and (reason.filename or reason.errno == errno.ENOSPC):
                raise  # the disk, not the network
            error = str(getattr(reason, "reason", None) or reason or type(reason).__name__)
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures < RETRIES:
            time.sleep(BACKOFF * 2 ** max(failures - 1, 0))
    raise DownloadError(f"cannot download: {error}. {_by_hand(file, path)}")


def _transfer_once(file: RemoteFile, part: Path, start: int) -> bool:
    """One connection; appends from byte start. True when all that was announced has come."""
    from urllib.request import Request, urlopen

    from tqdm import tqdm

    headers = {"User-Agent": "npclip"} | ({"Range": f"bytes={start}-"} if start else {})
    with urlopen(Request(file.url, headers=headers), timeout=TIMEOUT) as response:
        if start and not _continues(response, start):
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise DownloadError(
                f"{part.parent} has {free >> 20} MiB free, {(total - start) >> 20} MiB are needed"
            )
        bar: Any = tqdm(
            desc=file.filename, initial=start, total=total, unit="B", unit_scale=True,
            unit_divisor=1024, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        with bar, open(part, "ab" if start else "wb") as stream:
            while block := response.read1(CHUNK):  # read() drops its bytes at a stall
                stream.write(block)
                bar.update(len(block))
    return total is None or part.stat().st_size >= total


def _continues(response: Any, start: int) -> bool:
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {start}-")
