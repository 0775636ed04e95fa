"""npclip/nvrtc.py: finding the compiler, compiling, the cache, errors without one."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from npclip import nvrtc
from npclip.errors import BackendError

SOURCE = """
extern "C" __global__ void __launch_bounds__(128) double_f32(float *x) {
    __shared__ float tile[128];
    tile[threadIdx.x] = 2 * x[threadIdx.x];
    __syncthreads();
    x[127 - threadIdx.x] = tile[threadIdx.x];
}
"""
HALF = '#include <cuda_fp16.h>\nextern "C" __global__ void f(__half *x) { *x = __hadd(*x, *x); }'
needs_nvrtc = pytest.mark.skipif(not nvrtc.libraries(), reason="NVRTC is not installed")


@pytest.fixture(params=nvrtc.libraries(), ids=str)
def library(request):
    return request.param


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """The architectures compiled for, in order."""
    archs: list[str] = []
    compile_ = nvrtc.compile

    def recording(source, arch, options=(), library=None):
        archs.append(arch)
        return compile_(source, arch, options, library)

    monkeypatch.setattr(nvrtc, "compile", recording)
    return archs


# Finding


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """No NVRTC anywhere but below tmp_path, which is in sys.path."""
    for name in ("NPCLIP_NVRTC", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(nvrtc, "_from_pathfinder", lambda: iter(()))
    monkeypatch.setattr(nvrtc, "TOOLKITS", ())
    monkeypatch.setattr(nvrtc, "SYSTEM", ())
    return tmp_path


def test_the_wheels_of_both_cuda_versions_are_found_newest_first(empty_machine):
    old = touch(empty_machine / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    new = touch(empty_machine / "nvidia/cu13/lib/libnvrtc.so.13")
    touch(empty_machine / "nvidia/cuda_nvrtc/lib/libnvrtc.alt.so.12")
    touch(empty_machine / "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9")
    assert nvrtc.libraries() == [new, old]


def test_the_wheels_of_windows_are_found(empty_machine):
    old = touch(empty_machine / "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll")
    new = touch(empty_machine / "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll")
    touch(empty_machine / "nvidia/cuda_nvrtc/bin/nvrtc-builtins64_129.dll")
    assert nvrtc.libraries() == [new, old]


def test_a_toolkit_is_found_once_whatever_its_links(empty_machine, monkeypatch):
    real = touch(empty_machine / "cuda-12.9/lib64/libnvrtc.so.12.9.86")
    (real.parent / "libnvrtc.so.12").symlink_to(real.name)
    (real.parent / "libnvrtc.so").symlink_to("libnvrtc.so.12")
    (empty_machine / "cuda").symlink_to(empty_machine / "cuda-12.9")
    monkeypatch.setenv("CUDA_PATH", str(empty_machine / "cuda"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{real.parent}:/nonexistent")
    found = nvrtc.libraries()
    assert [path.resolve() for path in found] == [real.resolve()]


def test_npclip_nvrtc_names_the_libraries(monkeypatch):
    monkeypatch.setenv("NPCLIP_NVRTC", "/a/libnvrtc.so.12:/b/libnvrtc.so.13".replace(":", ";"))
    monkeypatch.setattr("os.pathsep", ";")
    assert nvrtc.libraries() == [Path("/a/libnvrtc.so.12"), Path("/b/libnvrtc.so.13")]


@pytest.mark.parametrize("call", [
    lambda: nvrtc.compile(SOURCE, "sm_80"),
    lambda: nvrtc.target((8, 0)),
    lambda: nvrtc.cubin(SOURCE, "sm_80"),
])  # fmt: skip
def test_without_nvrtc_the_error_says_what_to_install(call, monkeypatch):
    monkeypatch.setattr(nvrtc, "libraries", list)
    with pytest.raises(BackendError, match=r"pip install 'npclip\[cuda12\]'"):
        call()


def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "libnvrtc.so.12"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("NPCLIP_NVRTC", str(broken))
    with pytest.raises(BackendError, match=r"cannot load NVRTC from .*libnvrtc\.so\.12"):
        nvrtc.compile(SOURCE, "sm_80")


def test_headers_lie_beside_the_library_or_where_cuda_path_says(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "_other_headers", lambda: iter([tmp_path / "toolkit/include"]))
    library = tmp_path / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"
    with pytest.raises(BackendError, match="headers of CUDA 12"):
        nvrtc._headers(library, 12)

    def install(folder: str, version: int) -> Path:
        touch(tmp_path / folder / "cuda_fp16.h")
        header = tmp_path / folder / "cuda_runtime_api.h"
        header.write_text(f"#define CUDART_VERSION  {version}\n")
        return header.parent

    install("toolkit/include", 13000)
    with pytest.raises(BackendError, match="headers of CUDA 12"):
        nvrtc._headers(library, 12)
    other = install("toolkit/include", 12040)
    assert nvrtc._headers(library, 12) == other
    own = install("nvidia/cuda_runtime/include", 12090)
    assert nvrtc._headers(library, 12) == own
    new = install("nvidia/cu13/include", 13000)
    assert nvrtc._headers(tmp_path / "nvidia/cu13/lib/libnvrtc.so.13", 13) == new


# Compiling


@needs_nvrtc
def test_a_cubin_and_what_it_uses(library):
    program = nvrtc.compile(SOURCE, "sm_80", library=library)
    assert program.binary[:4] == b"\x7fELF"
    usage = program.usage["double_f32"]
    assert 0 < usage.registers < 64
    assert (usage.spill_bytes, usage.stack_bytes, usage.shared_bytes) == (0, 0, 512)


@needs_nvrtc
def test_what_nvrtc_itself_loads_is_found_beside_it(library):
    """Also where neither its RUNPATH nor cuda.pathfinder helps."""
    code = f"""
from pathlib import Path
from npclip import nvrtc
nvrtc._from_pathfinder = lambda: iter(())
library = Path({str(library)!r})
print(nvrtc.version(library), len(nvrtc.compile({SOURCE!r}, "sm_80", library=library).binary))"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert printed[0] == nvrtc.version(library) and int(printed[1]) > 0


@needs_nvrtc
def test_ptx(library):
    program = nvrtc.compile(SOURCE, "compute_80", ["-lineinfo"], library)
    assert ".entry double_f32" in program.binary.decode()
    assert ".loc" in program.binary.decode()
    assert program.usage == {}


@needs_nvrtc
def test_the_headers_of_half_precision_are_found(library):
    assert nvrtc.compile(HALF, "sm_75", library=library).binary


@needs_nvrtc
def test_an_error_has_the_compilers_log(library):
    with pytest.raises(BackendError, match=r"(?s)sm_80.*kernel\.cu\(1\): error.*nonsense"):
        nvrtc.compile("nonsense x;", "sm_80", library=library)


@needs_nvrtc
def test_an_architecture_that_does_not_exist(library):
    with pytest.raises(BackendError, match="sm_33"):
        nvrtc.compile(SOURCE, "sm_33", library=library)


@needs_nvrtc
def test_target_is_the_best_of_the_same_major_version(library):
    assert nvrtc.target((7, 5), library) == "75"
    assert nvrtc.target((8, 0), library) == "80"
    assert nvrtc.target((8, 9), library) == "89"
    assert nvrtc.target((9, 0), library) == "90"
    assert nvrtc.target((9, 9), library) == "90"  # of a device that this NVRTC does not know
    for unknown in ((3, 0), (99, 0)):
        with pytest.raises(BackendError, match=f"{unknown[0]}.0"):
            nvrtc.target(unknown, library)


def test_the_usage_of_a_log():
    log = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'one' for 'sm_80'\n"
        "ptxas info    : Function properties for one\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 20 registers, used 0 barriers, 360 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_80'\n"
        "ptxas info    : Function properties for two\n"
        "    88 bytes stack frame, 120 bytes spill stores, 96 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 88 bytes cumulative stack size, "
        "1024 bytes smem, 360 bytes cmem[0]\n"
    )
    assert nvrtc._usage(log) == {
        "one": nvrtc.Usage(registers=20, spill_bytes=0, stack_bytes=0, shared_bytes=0),
        "two": nvrtc.Usage(registers=255, spill_bytes=216, stack_bytes=88, shared_bytes=1024),
    }


@needs_nvrtc
def test_several_threads_may_compile():
    results, errors = [], []

    def work(i):
        try:
            source = SOURCE.replace("double_f32", f"kernel_{i}")
            results.append(f"kernel_{i}" in nvrtc.compile(source, "sm_80").usage)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and results == [True] * 8


# The cache


@needs_nvrtc
def test_a_cubin_is_compiled_once(cache, compiled):
    path = nvrtc.cubin(SOURCE, "sm_80")
    assert path.parent == cache / "kernels" and path.suffix == ".cubin"
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert nvrtc.cubin(SOURCE, "sm_80") == path
    assert compiled == ["sm_80"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    others = {
        nvrtc.cubin(SOURCE, "sm_90"),
        nvrtc.cubin(SOURCE + "\n", "sm_80"),
        *(nvrtc.cubin(SOURCE, "sm_80", library) for library in nvrtc.libraries()),
    }
    assert len(others | {path}) == 2 + len({nvrtc.version(p) for p in nvrtc.libraries()})


@needs_nvrtc
@pytest.mark.parametrize("size", [0, 10, 100, -1])
def test_a_damaged_cubin_is_compiled_anew(cache, compiled, size):
    path = nvrtc.cubin(SOURCE, "sm_80")
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert nvrtc.cubin(SOURCE, "sm_80") == path
    assert path.read_bytes() == whole
    assert len(compiled) == 2


@needs_nvrtc
def test_where_the_cache_cannot_be_written_a_temporary_folder_serves(
    tmp_path, monkeypatch, compiled
):
    touch(tmp_path / "file")
    monkeypatch.setenv("NPCLIP_CACHE", str(tmp_path / "file"))
    path = nvrtc.cubin(SOURCE, "sm_86")
    assert tmp_path not in path.parents and path.stat().st_size > 0
    assert nvrtc.cubin(SOURCE, "sm_86") == path
    assert compiled == ["sm_86"]


@needs_nvrtc
def test_without_a_home_directory_a_temporary_folder_serves(monkeypatch):
    from npclip import hub
    from npclip.errors import DownloadError

    def homeless(root=None):
        raise DownloadError("no home")

    monkeypatch.setattr(hub, "cache_directory", homeless)
    assert nvrtc.cubin(SOURCE, "sm_80").stat().st_size > 0


@needs_nvrtc
def test_several_processes_may_ask_for_the_same_cubin(cache):
    code = f"from npclip import nvrtc; print(nvrtc.cubin({SOURCE!r}, 'sm_80'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(paths) == 1
    assert nvrtc._is_whole(Path(paths.pop()))
    assert len(list((cache / "kernels").iterdir())) == 1


def test_importing_it_loads_no_compiler():
    code = "import sys; from npclip import nvrtc; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"cuda", "cupy", "cuda.pathfinder", "filelock"} & set(modules)
