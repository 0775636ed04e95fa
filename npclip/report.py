"""show_config(): what this installation computes with, and why not with more."""

from __future__ import annotations

import os
import platform
from typing import Any

from .errors import InputError


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print the backend, ISA, threads and versions in use; mode="dicts" returns them instead."""
    import numpy as np

    from . import __version__, threads

    config = {
        "npclip": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cpu backend": _cpu_backend(),
        "threads": threads.get_num_threads(),
        "blas": _blas(np),
        "cuda backend": _cuda_backend(),
    }
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise InputError(f'mode must be "stdout" or "dicts", not {mode!r}')
    for name, value in config.items():
        print(f"{name + ':':<14}{value}")
    return None


def _cpu_backend() -> str:
    from . import cpu_library

    if reason := cpu_library.why_unavailable():
        return f"NumPy (kernels/reference.py): {reason}"
    best, machine = cpu_library.isas()[0], cpu_library.machine_isas()[0]
    capped = f", capped by NPCLIP_ISA from {machine}" if best != machine else ""
    return f"C kernels, {best}{capped}: {cpu_library.library_path()}"


def _cuda_backend() -> str:
    from . import cuda_device

    if reason := cuda_device.why_unavailable():
        return f"none: {reason}"
    devices = map(cuda_device.open_device, range(cuda_device.device_count()))
    return ", ".join(f"{device} ({device.name})" for device in devices)


def _blas(np: Any) -> str:
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    except (KeyError, TypeError):
        return "unknown"
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
