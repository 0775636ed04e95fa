"""show_config(): what this installation computes with, and why not with more."""

from __future__ import annotations

import os
import platform
from typing import Any


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print the backend, ISA, threads and versions in use; mode="dicts" returns them instead."""
    import numpy as np

    from . import __version__

    config = {
        "npclip": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cpu backend": "NumPy (kernels/reference.py), float32",
        "blas": _blas(np),
        "cuda backend": "none: not part of this version",
    }
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise ValueError(f'mode must be "stdout" or "dicts", not {mode!r}')
    for name, value in config.items():
        print(f"{name + ':':<14}{value}")
    return None


def _blas(np: Any) -> str:
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    except (KeyError, TypeError):
        return "unknown"
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
