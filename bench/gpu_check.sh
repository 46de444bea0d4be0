#!/usr/bin/env bash
# All that needs a GPU, in one go, on a machine with an NVIDIA GPU, CUDA's compiler and a torch that sees the GPU;
# no network is used. Everything is written to one folder; the exit code is 0 if all was well.
#
#   bench/gpu_check.sh OUT [COMMIT] [ARGUMENTS OF python -m bench ...]
#
# COMMIT is noted in the figures where there is no git ("-": ask git). PYTHON chooses the interpreter.
# OUT gets summary.txt, {build,memcheck,racecheck,bits,emulator,tests,bench}.log and bench.{json,html,md}.
set -uo pipefail
if [ $# -lt 1 ]; then
  echo "gpu_check: name the folder for logs and figures: bench/gpu_check.sh OUT [COMMIT]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
commit=${2:--}
shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
failed=0
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# step NAME LOG SECONDS COMMAND...: runs it under a time limit, logs it, notes how it ended
step() {
  local name=$1 log=$out/$2 limit=$3 start=$SECONDS status
  shift 3
  echo "+ $*" >>"$log"
  timeout "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  if [ "$status" -eq 0 ]; then
    say "well    $name ($((SECONDS - start)) s)"
  else
    say "FAILED  $name ($((SECONDS - start)) s, exit code $status, see ${log##*/})"
    failed=1
  fi
  return "$status"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# The package in place, for the GPU that is here; without a recent enough setuptools by CMake alone.
build() {
  RFK_CUDA=ON RFK_CUDA_ARCHS="" "$python" -m pip install -q --no-build-isolation --no-deps -e . && return
  echo "pip cannot build here; building with cmake"
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DRFK_OUTPUT_DIRECTORY="$PWD/rfkernels" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build build/gpu
}
export -f build
export python

rm -f "$out"/{build,memcheck,racecheck,bits,emulator,tests,bench}.log "$out"/bench.{json,html,md}
say "$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv,noheader 2>&1)"
say "$("$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>&1)"
say "commit $commit, $(date -u +%FT%TZ)"

step "a GPU that torch sees" build.log 120 "$python" -c 'import torch; torch.zeros(1, device="cuda")' || exit 1
step "build for this GPU" build.log 580 bash -c build || exit 1
step "kernels built with CUDA" build.log 60 "$python" -c '
from rfkernels._C import build_info
info = build_info()
print(info)
assert info["cuda"], "the build found no nvcc"' || exit 1

# Without torch's cache each tensor is an allocation of its own, so that a read past its end is seen.
memcheck=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
if command -v compute-sanitizer >/dev/null; then
  memcheck+=(compute-sanitizer --tool memcheck --error-exitcode 1)
  # Our kernels alone: races of torch's are not ours to judge.
  racecheck=(compute-sanitizer --tool racecheck --error-exitcode 1 --kernel-name kernel_substring=rfk)
  step "no races in shared memory" racecheck.log 120 "${racecheck[@]}" "$python" -m bench.smoke cuda
else
  say "note    compute-sanitizer is not here: the ops are only compared"
fi
step "every op on awkward shapes" memcheck.log 180 "${memcheck[@]}" "$python" -m bench.smoke cuda

# CPU kernels, emulated CUDA kernels, CUDA kernels: the same bits. CI ties the first two, and so does the second
# step for the CPU that is here; the first step closes the triangle.
step "the GPU gives the bits of the CPU" bits.log 120 "$python" -m bench.same_bits cpu cuda
options=(-o "addopts=-q --strict-markers" -p no:cacheprovider)
has pytest_benchmark && options=(-p no:cacheprovider)
step "emulated kernels give the bits of the CPU" emulator.log 240 "$python" -m pytest "${options[@]}" tests/emulator
step "all other tests" tests.log 580 "$python" -m pytest "${options[@]}" tests --ignore tests/emulator

note=()
[ "$commit" != - ] && note=(--commit "$commit")
arguments=("$@")
[ $# -eq 0 ] && arguments=(--seconds 1)
step "benchmarks" bench.log 580 \
  "$python" -m bench --device cuda --json "$out/bench.json" "${note[@]}" "${arguments[@]}"
if [ -f "$out/bench.json" ]; then
  step "report" bench.log 60 "$python" -m bench report "$out/bench.json" -o "$out/bench.html"
  step "results as text" bench.log 60 "$python" -m bench report "$out/bench.json" -o "$out/bench.md"
fi

[ "$failed" -eq 0 ] && say "all well" || say "not all well"
exit "$failed"
