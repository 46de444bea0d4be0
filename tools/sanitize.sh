#!/usr/bin/env bash
# Builds the CPU kernels and the bindings under the address and undefined-behaviour sanitizers and runs a part of
# the op tests on them: a step past the end of a tensor, or undefined behaviour, aborts the run. Kept in
# build/sanitize. The argument is the Python to build for; it has torch and the test tools.
set -euo pipefail
python=$("${1:-python3}" -c 'import sys; print(sys.executable)')
root=$PWD/build/sanitize
flags="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

mkdir -p "$root"
"$python" -m pip install -q "cmake>=3.30" ninja
cmake=$("$python" -c 'import cmake; print(cmake.CMAKE_BIN_DIR)')/cmake
ninja=$("$python" -c 'import ninja; print(ninja.BIN_DIR)')/ninja
"$cmake" -S . -B "$root/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DRFK_CUDA=OFF \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="$flags" -DRFK_OUTPUT_DIRECTORY="$root/lib" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  >"$root/cmake.log" 2>&1 || { cat "$root/cmake.log"; exit 1; }
"$cmake" --build "$root/cmake"

# The package and its tests around the sanitized libraries, away from those of the checkout.
rm -rf "$root/package"
mkdir -p "$root/package"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude=weights --exclude=results rfkernels tests bench pyproject.toml |
  tar -x -C "$root/package"
cp "$root"/lib/*.so "$root/package/rfkernels"
cd "$root/package"

# Python and torch are not sanitized: the sanitizer's library is loaded first, so that tensors come from its
# malloc, and with it libstdc++, whose throw it wraps.
export LD_PRELOAD PYTHONMALLOC=malloc OMP_NUM_THREADS=2
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -c "import rfkernels._C as m; assert '$root' in m.__file__, m.__file__"
# --capture=sys: the sanitizer's report, written as the process dies, is not held back.
"$python" -m pytest --capture=sys -p no:cacheprovider tests/ops tests/test_bindings.py \
  -k "not emulated and not fuzzed and not compiles and not obeys and not gradients and not 2_31_bytes and not memory_grows"
