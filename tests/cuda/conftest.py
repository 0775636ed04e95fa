"""Puts tests/ on sys.path, and skips tests that need a compiler which is not there.

Under CI=true nothing is skipped: a session without a C++ compiler or without NVRTC of both CUDA
versions does not begin, and a test whose sanitizer does not work fails.

There is no __init__.py in this folder: `cuda` is a namespace package, of which cuda.pathfinder
(which finds NVRTC) may be another part.
"""

import os
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

from cuda import gate, shim  # noqa: E402

from npclip import nvrtc  # noqa: E402
from npclip.errors import BackendError  # noqa: E402


def pytest_sessionstart():
    if os.environ.get("CI") != "true":
        return
    found = {nvrtc.cuda_version(path)[0] for path in nvrtc.libraries()}
    lacking = [f"NVRTC of CUDA {cuda}" for cuda in gate.CUDAS if cuda not in found]
    if shim.compiler() is None:
        lacking.append("a C++ compiler")
    if lacking:
        raise pytest.UsageError(f"CI=true, yet there is not: {', '.join(lacking)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except shim.Unavailable as reason:
        gate.missing(str(reason))
    except BackendError as reason:
        if nvrtc.libraries():
            raise
        gate.missing(str(reason))
