#!/usr/bin/env bash
# Tests the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, then the thread pool and
# they under ThreadSanitizer: tools/sanitize.sh [address,undefined | thread]... [-- FOLDER]
#
# Needs GCC, CMake and the test requirements in `python`. FOLDER holds the sources, kernels/ unless
# given: plant a bug in a copy to see it caught. The AMX kernels run with emulated tiles, so that every
# machine with AVX512-BF16 tests them; their largest products, which take a minute, are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizers=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do sanitizers+=("$1") && shift; done
[ ${#sanitizers[@]} -gt 0 ] || sanitizers=(address,undefined thread)
folder=${2:-kernels}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Python keeps memory until it exits, so leaks are not looked for. ThreadSanitizer sees the library's
# accesses and every lock: no suppressions are needed. It does not support a fork of several threads, so
# it sees no test that forks, and is slow, so it sees each kernel at one or two shapes. OpenBLAS's threads,
# which it cannot see into, stay out of the way.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1
export OPENBLAS_NUM_THREADS=1 NPCLIP_NUM_THREADS=3 PYTHONMALLOC=malloc

for sanitizer in "${sanitizers[@]}"; do
  case $sanitizer in
    thread)
      runtime=libtsan.so files=(tests/test_kernels.py tests/test_training_kernels.py tests/test_threads.py)
      select="not fork and not gunicorn and not multiprocessing and (threads or bits or layer_norm or patchify
        or avg_pool2d or (similarity and 333) or (linear and 97) or (conv2d and 130) or ((attention or attention_pool) and 50-64))"
      ;;
    *)
      runtime=libasan.so files=(tests/test_kernels.py tests/test_training_kernels.py tests/test_resize.py)
      select="not (amx and (test_linear and (768 or 1024) or bfloat16 and (257 or 577 or 1024)))"
      ;;
  esac
  cmake -S "$folder" -B "$work/$sanitizer" -DCMAKE_BUILD_TYPE=Release -DNPCLIP_EMULATE_AMX=ON \
    -DNPCLIP_SANITIZE="$sanitizer" -DCMAKE_C_COMPILER=gcc > "$work/log"
  cmake --build "$work/$sanitizer" --parallel >> "$work/log" || { cat "$work/log" && exit 1; }
  NPCLIP_LIBRARY="$work/$sanitizer/npclip_cpu.so" LD_PRELOAD=$(gcc -print-file-name="$runtime") \
    python -m pytest -q --capture=sys -p no:cacheprovider -k "$(tr -s '\n ' ' ' <<< "$select")" "${files[@]}"
done
