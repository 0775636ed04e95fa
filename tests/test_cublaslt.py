"""cublaslt.py with a fake library that computes and, where it is installed, with the real one."""

import ctypes
import gc
import re
import threading
from ctypes import byref, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import pytest

from npclip import cublaslt
from npclip.cublaslt import WORKSPACE_BYTES, CublasLt, HeuristicResult, Library, Product
from npclip.errors import BackendError

STATUS_NAMES = {
    1: b"CUBLAS_STATUS_NOT_INITIALIZED",
    7: b"CUBLAS_STATUS_INVALID_VALUE",
    13: b"CUBLAS_STATUS_EXECUTION_FAILED",
    14: b"CUBLAS_STATUS_INTERNAL_ERROR",
    15: b"CUBLAS_STATUS_NOT_SUPPORTED",
}


def address(x):
    return x.value if isinstance(x, c_void_p) else x


def read(reference, size):
    raw = bytes(ctypes.string_at(ctypes.addressof(reference._obj), size))
    assert ctypes.sizeof(reference._obj) == size
    return int.from_bytes(raw, "little")


class FakeLibrary:
    """cuBLASLt's descriptors, kept in dicts, and products of float32 arrays on the host."""

    def __init__(self, states=(0,), fail=None):
        self.states, self.fail = states, fail  # of the algorithms; (function, status)
        self.alive, self.next, self.calls, self.attributes = {}, 1000, [], {}
        for name in cublaslt.SIGNATURES:
            setattr(self, name, self._function(name))
        self.cublasLtGetStatusName = lambda status: STATUS_NAMES[status]
        self.cublasLtGetVersion = lambda *_: 120905

    def _function(self, name):
        def call(*arguments):
            assert len(arguments) == len(cublaslt.SIGNATURES[name])
            self.calls.append(name)
            if self.fail and self.fail[0] == name:
                return self.fail[1]
            return getattr(self, "_" + re.sub(r"^cublasLt", "", name))(*arguments) or 0

        return call

    def _new(self, handle, what):
        self.next += 1
        self.alive[self.next], handle._obj.value = what, self.next

    def _free(self, handle):
        del self.alive[handle.value]  # KeyError if freed twice

    def _Create(self, handle):
        self._new(handle, "handle")

    def _MatmulDescCreate(self, handle, compute, scale):
        assert (compute, scale) == (68, 0)
        self._new(handle, {})

    def _MatrixLayoutCreate(self, handle, *matrix):
        self._new(handle, matrix)

    def _MatmulPreferenceCreate(self, handle):
        self._new(handle, {})

    _Destroy = _MatmulDescDestroy = _MatrixLayoutDestroy = _MatmulPreferenceDestroy = _free

    def _MatmulDescSetAttribute(self, handle, attribute, reference, size):
        self.alive[handle.value][attribute] = read(reference, size)

    _MatmulPreferenceSetAttribute = _MatmulDescSetAttribute

    def _MatmulAlgoGetHeuristic(self, handle, operation, a, b, c, d, preference, count, out, found):
        assert self.alive[handle.value] == "handle"
        self.operation = dict(self.alive[operation.value])
        self.layouts = [self.alive[layout.value] for layout in (a, b, c, d)]
        self.preference = dict(self.alive[preference.value])
        found._obj.value = min(count, len(self.states))
        for i in range(found._obj.value):
            out._obj[i].state, out._obj[i].workspaceSize = self.states[i], 100 + i
            out._obj[i].algo.data[0], out._obj[i].wavesCount = i + 1, 0.5

    def _Matmul(
        self, handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
        algorithm, workspace, workspace_bytes, stream,
    ):  # fmt: skip
        assert self.alive[handle.value] == "handle"
        attributes = self.alive[operation.value]
        assert (attributes[3], attributes[4]) == (1, 0)  # A^T B
        self.matmul = algorithm._obj.data[0], workspace, workspace_bytes, stream
        left = self._matrix(a, a_layout).T @ self._matrix(b, b_layout)
        to = self._matrix(d, d_layout)
        if attributes[7] == 4:
            pointer = ctypes.cast(attributes[8], ctypes.POINTER(c_float))
            left += np.ctypeslib.as_array(pointer, (len(left),))[:, None]
        to[...] = alpha._obj.value * left + beta._obj.value * self._matrix(c, c_layout)

    def _matrix(self, at, layout):  # float32, by columns
        kind, rows, columns, ld = self.alive[layout.value]
        assert kind == 0
        pointer = ctypes.cast(at, ctypes.POINTER(c_float))
        return np.ctypeslib.as_array(pointer, (columns, ld))[:, :rows].T


def shape(**changes):
    whole = {"n": 5, "k": 8, "m": 12, "kind": "f16", "result_kind": "f16"} | {
        "ldx": 8, "ldw": 16, "ldy": 24, "bias": False, "residual": False, "count": 4,
    }  # fmt: skip
    return whole | changes


def test_plan():
    lt = FakeLibrary(states=(0, 15, 0))
    plans = CublasLt(lt).plan(**shape(result_kind="f32", bias=True, residual=True))
    assert [(p.algorithm.data[0], p.workspace_bytes, p.waves) for p in plans] == [
        (1, 100, 0.5),
        (3, 102, 0.5),
    ]
    f16, f32 = 2, 0
    assert lt.layouts == [(f16, 8, 12, 16), (f16, 8, 5, 8), (f32, 12, 5, 24), (f32, 12, 5, 24)]
    assert lt.operation == {3: 1, 4: 0, 7: 4, 8: 16}
    assert lt.preference == {1: WORKSPACE_BYTES, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}


def test_plan_without_bias():
    lt = FakeLibrary()
    assert len(CublasLt(lt).plan(**shape(kind="bf16", result_kind="bf16"))) == 1
    assert lt.operation == {3: 1, 4: 0, 7: 1}
    assert {layout[0] for layout in lt.layouts} == {14}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [None, "other", "same"])
def test_run(bias, residual):
    rng = np.random.default_rng(1)
    x, w, y, other = (
        rng.standard_normal(s, np.float32) for s in [(5, 8), (12, 16), (5, 24), (5, 24)]
    )
    b, before = rng.standard_normal(12, np.float32), y.copy()
    lt = FakeLibrary()
    handle = CublasLt(lt)
    how = {"kind": "f32", "result_kind": "f32", "bias": bias, "residual": residual is not None}
    (plan,) = handle.plan(**shape(**how))
    r = {None: None, "other": other, "same": y}[residual]
    expected = x @ w[:, :8].T + (b if bias else 0) + (0 if r is None else r[:, :12])
    handle.run(
        plan,
        x.ctypes.data,
        w.ctypes.data,
        b.ctypes.data if bias else None,
        None if r is None else r.ctypes.data,
        y.ctypes.data,
        77,
        99,
    )
    assert np.allclose(y[:, :12], expected, atol=1e-5)
    assert (y[:, 12:] == before[:, 12:]).all()
    assert lt.matmul == (1, 77, plan.workspace_bytes, 99)


@pytest.mark.parametrize("bias, residual", [(1, None), (None, 1)])
def test_run_with_what_the_plan_has_not(bias, residual):
    lt = FakeLibrary()
    handle = CublasLt(lt)
    (plan,) = handle.plan(**shape())
    with pytest.raises(ValueError, match="a plan with a bias"):
        handle.run(plan, 1, 1, bias, residual, 1, 1, 1)
    assert "cublasLtMatmul" not in lt.calls


def test_a_bias_is_set_and_read_by_one_thread_at_a_time():
    lt, seen = FakeLibrary(), []
    lt._Matmul = lambda handle, operation, *_: seen.append(
        (threading.get_ident(), lt.alive[operation.value][8])
    )
    handle = CublasLt(lt)
    (plan,) = handle.plan(**shape(bias=True))

    def work():
        for _ in range(50):
            handle.run(plan, 1, 1, threading.get_ident(), None, 1, 1, 0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200 and all(thread == bias for thread, bias in seen)


def test_everything_is_freed():
    lt = FakeLibrary()
    handle = CublasLt(lt)
    plans = handle.plan(**shape())
    assert len(lt.alive) == 6  # handle, operation, 4 layouts: the preference is gone
    del plans
    gc.collect()
    assert list(lt.alive.values()) == ["handle"]
    handle.close()
    handle.close()
    assert not lt.alive
    CublasLt(lt)
    gc.collect()
    assert not lt.alive


@pytest.mark.parametrize("function", [f for f in cublaslt.SIGNATURES if "Destroy" not in f])
def test_failures(function):
    lt = FakeLibrary(fail=(function, 14))
    message = f"{function} failed: CUBLAS_STATUS_INTERNAL_ERROR"
    with pytest.raises(BackendError, match=message):
        handle = CublasLt(lt)
        (plan,) = handle.plan(**shape())
        handle.run(plan, 1, 1, None, None, 1, 1, 0)
    plan = handle = None
    gc.collect()
    assert not lt.alive


def test_unsupported_products_have_no_plan():
    lt = FakeLibrary(fail=("cublasLtMatmulAlgoGetHeuristic", 15))
    assert CublasLt(lt).plan(**shape()) == []
    assert CublasLt(FakeLibrary(states=())).plan(**shape()) == []


def test_missing_library(monkeypatch):
    monkeypatch.setenv("NPCLIP_CUBLASLT", "/nonexistent/libcublasLt.so")
    with pytest.raises(BackendError, match=r"not installed .*nonexistent.*npclip\[cuda12\]"):
        CublasLt()


def test_old_library():
    lt = FakeLibrary()
    del lt.cublasLtMatmul
    with pytest.raises(BackendError, match=r"too old: .*cublasLtMatmul"):
        CublasLt(lt)


def test_layout_of_results():  # as the header's structs are laid out
    assert ctypes.sizeof(cublaslt.Algorithm) == 64
    offsets = {name: getattr(HeuristicResult, name).offset for name, _ in HeuristicResult._fields_}
    assert offsets == {
        "algo": 0,
        "workspaceSize": 64,
        "state": 72,
        "wavesCount": 76,
        "reserved": 80,
    }
    assert ctypes.sizeof(HeuristicResult) == 96


# The real library, which makes descriptors without a GPU


@pytest.fixture(scope="module")
def real():
    try:
        return cublaslt.load()
    except BackendError as error:  # as in CI: the fake library has to do
        pytest.skip(f"a download of hundreds of MB that nothing else here needs: {error}")


def attribute(real, operation, number, of):
    x, written = of(), c_size_t()
    real.cublasLtMatmulDescGetAttribute.argtypes = (
        c_void_p,
        ctypes.c_int,
        c_void_p,
        c_size_t,
        c_void_p,
    )
    assert not real.cublasLtMatmulDescGetAttribute(
        operation, number, byref(x), ctypes.sizeof(x), byref(written)
    )
    assert written.value == ctypes.sizeof(x)
    return x.value


def layout_attribute(real, layout, number, of):
    x, written = of(), c_size_t()
    real.cublasLtMatrixLayoutGetAttribute.argtypes = (
        c_void_p,
        ctypes.c_int,
        c_void_p,
        c_size_t,
        c_void_p,
    )
    assert not real.cublasLtMatrixLayoutGetAttribute(
        layout, number, byref(x), ctypes.sizeof(x), byref(written)
    )
    return x.value


def test_real_descriptors(real):
    product = Product(Library(real), 5, 8, 12, "bf16", "f32", 8, 16, 24, bias=True, residual=True)
    numbers = [(0, c_int32), (1, c_int32), (3, c_int32), (4, c_int32), (7, c_uint32), (8, c_uint64)]
    found = [attribute(real, product.operation, *number) for number in numbers]
    assert found == [68, 0, 1, 0, 4, 16]
    layouts = [
        tuple(
            layout_attribute(real, layout, *number)
            for number in [(0, c_uint32), (2, c_uint64), (3, c_uint64), (4, c_uint64)]
        )
        for layout in product.layouts
    ]
    assert layouts == [(14, 8, 12, 16), (14, 8, 5, 8), (0, 12, 5, 24), (0, 12, 5, 24)]


def test_real_preferences(real):
    lt, preference = Library(real), c_void_p()
    handle = CublasLt.__new__(CublasLt)
    handle._lt = lt
    lt("cublasLtMatmulPreferenceCreate", byref(preference))
    handle._prefer(preference, cublaslt.CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, c_uint64(1 << 25))
    for number in cublaslt.ALIGNMENTS:
        handle._prefer(preference, number, c_uint32(16))
    with pytest.raises(BackendError, match="CUBLAS_STATUS_INVALID_VALUE"):
        handle._prefer(preference, cublaslt.ALIGNMENTS[0], c_uint64(16))  # of another size
    lt("cublasLtMatmulPreferenceDestroy", preference)


def test_numbers_are_the_header_s(real):
    include = Path(real._name).parent.parent / "include"
    headers = [include / name for name in ("cublasLt.h", "cublas_api.h", "library_types.h")]
    text = "".join(path.read_text() for path in headers if path.is_file())
    if not text:
        pytest.skip("the headers are not installed")
    found = dict(re.findall(r"\b((?:CUBLAS|CUDA_R_)\w+) *= *(\d+)\b", text))
    constants = {
        name: x for name, x in vars(cublaslt).items() if re.match("CUBLAS[A-Z]*_|CUDA_R_", name)
    }
    assert len(constants) > 15
    for name, x in constants.items():
        if name in found or "CUDA_R" not in name:  # those stand in another package
            assert int(found[name]) == x, name
