"""Puts tests/ on sys.path, and skips tests that need a compiler which is not there.

There is no __init__.py in this folder: `cuda` is a namespace package, of which cuda.pathfinder
(which finds NVRTC) may be another part.
"""

import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

from cuda import shim  # noqa: E402

from npclip import nvrtc  # noqa: E402
from npclip.errors import BackendError  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except shim.Unavailable as reason:
        pytest.skip(str(reason))
    except BackendError as reason:
        if nvrtc.libraries():
            raise
        pytest.skip(str(reason))
