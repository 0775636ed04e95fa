"""Fetch the pinned packages with the registries' own clients, verify them, unpack what is needed.

npm and apt-get ask whatever registry this machine is set up for; what counts is the SHA-256.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from npclip.checkpoint import sha256
from npclip.errors import DownloadError

from .sources import SOURCES, Source

ICON_FILES = ("icons.json", "chars.json", "metadata.json", "info.json")
TEXT_FILES = ("annotations/en/annotations.json", "annotationsDerived/en/annotations.json")


def download(folder: Path, sources: Sequence[Source] = SOURCES) -> None:
    """folder/archives/ with every package and folder/sources/NAME/ with what it holds.

    An archive that is there, put by hand for example, is verified and not fetched again. Raises
    DownloadError where a client fails, and where an archive is not the pinned one.
    """
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for source in sources:
        path = archives / source.archive
        if not path.exists():
            fetch(source, archives)
        verify(source, path)
        place = folder / "sources" / source.name
        if not place.exists():
            unpack(source, path, place)


def fetch(source: Source, archives: Path) -> None:
    """By npm or apt-get, whichever has it. Raises DownloadError."""
    command = (
        ["apt-get", "download", "-q", f"{source.package}={source.version}"]
        if source.registry == "debian"
        else ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    )
    try:
        done = subprocess.run(command, cwd=archives, capture_output=True, text=True)
    except OSError as error:
        raise DownloadError(f"{source.name}: {command[0]} does not start: {error}") from error
    if done.returncode or not (archives / source.archive).exists():
        said = (done.stderr or done.stdout).strip()[-300:]
        raise DownloadError(
            f"{source.name}: {' '.join(command)} gave no {source.archive} "
            f"(it may be put into {archives} by hand): {said}"
        )


def verify(source: Source, path: Path) -> None:
    """Raises DownloadError where the archive's SHA-256 is another."""
    found = sha256([path])
    if found != source.sha256:
        raise DownloadError(f"{path}: its SHA-256 is {found}, not {source.sha256}")


def unpack(source: Source, path: Path, place: Path) -> None:
    """What drawings.py reads, and nothing else; place exists only when all of it is there."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if source.registry == "debian":
        try:
            subprocess.run(["dpkg-deb", "-x", path, part], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise DownloadError(f"{path}: dpkg-deb does not unpack it: {error}") from error
    else:
        with tarfile.open(path) as archive:
            for name in ICON_FILES + TEXT_FILES:
                member = f"package/{name}"
                if member in archive.getnames():
                    target = part / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    stream = archive.extractfile(member)
                    assert stream is not None, f"{member} is a file"
                    target.write_bytes(stream.read())
    part.rename(place)
