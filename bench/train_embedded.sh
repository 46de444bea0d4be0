#!/usr/bin/env bash
# One leg of training the embedded model on a GPU that is there for minutes, from checkpoint to checkpoint.
#
#   bench/train_embedded.sh OUT [PHASE] [CHECKPOINT] [PACK]
#
#   PHASE       flow (default), reflow, distil, lora
#   CHECKPOINT  OUT of the leg before, or a weights file to start from; "-": none
#   PACK        emoji-128.pack, the glyphs; "-" or nothing: the one in the cache
#
# Variables: MINUTES (9, of this leg with its start-up), TOTAL (minutes of all legs: the learning rate falls over
# them; the recipe's), STEPS (instead of TOTAL), BATCH, CONFIG (full), START (weights: teacher of reflow and distil,
# base of a LoRA; needed in every leg unless it is the package's own), STYLE (pixel, outline, glow), RANK (of distil:
# a LoRA for few steps), COUNT (of pairs), DEVICE (cuda), WORKERS, COMPILE (1), SCORES (1), CHECK (1: only check
# the bytes that travel), PYTHON.
#
# Bytes there: repository (13 MiB) + pack (25) + checkpoint (at most 15 compact) <= 64 MiB. Bytes back: 8 files of
# at most 16 MiB, 64 MiB together: the weights (a byte a parameter, <= 16 MiB), log.jsonl, sheet_*.png, scores.json,
# last.pt.json (bytes and sha256) and up to 3 parts of last.pt of at most 15 MiB. The checkpoint is whole where that
# fits: the next leg goes on to the same bits; else compact, the averaged weights as int8 rows: the optimizers start
# anew with a warm-up at the same place of the schedule. More than that is refused with the numbers.
set -uo pipefail
begun=$(date +%s)
if [ $# -lt 1 ]; then
  echo "train_embedded: name the folder for results: bench/train_embedded.sh OUT [PHASE] [CHECKPOINT] [PACK]" >&2
  exit 2
fi
absolute() { case $1 in -|"") echo "" ;; *) realpath -m "$1" ;; esac; }
out=$(absolute "$1") phase=${2:-flow} checkpoint=$(absolute "${3:-}") pack=$(absolute "${4:-}")
start=$(absolute "${START:-}")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} device=${DEVICE:-cuda} minutes=${MINUTES:-9}
export PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2

arguments=("$out" --phase "$phase" --begun "$begun" --minutes "$minutes" --device "$device"
  --config "${CONFIG:-full}" --style "${STYLE:-pixel}" --rank "${RANK:-0}" --count "${COUNT:-50000}")
[ -n "$checkpoint" ] && arguments+=(--checkpoint "$checkpoint")
[ -n "$pack" ] && arguments+=(--pack "$pack")
[ -n "$start" ] && arguments+=(--start "$start")
[ -n "${TOTAL:-}" ] && arguments+=(--total "$TOTAL")
[ -n "${STEPS:-}" ] && arguments+=(--steps "$STEPS")
[ -n "${BATCH:-}" ] && arguments+=(--batch "$BATCH")
[ "${COMPILE:-1}" = 0 ] && arguments+=(--no-compile)
if [ "${CHECK:-0}" = 1 ]; then exec "$python" -m bench.train_leg "${arguments[@]}" --check; fi

if [ "$device" != cpu ]; then
  "$python" -c 'import torch; torch.zeros(1, device="cuda"); print(torch.cuda.get_device_name(), torch.__version__)' ||
    { echo "train_embedded: torch sees no GPU here: DEVICE=cpu trains on the CPU" >&2; exit 2; }
  arguments+=(--workers "${WORKERS:-$(($(nproc) > 2 ? $(nproc) - 2 : 1))}")
else
  arguments+=(--workers "${WORKERS:-0}")
fi

# The compiled ops; they keep the noise of a run the same everywhere, so they are needed on the CPU as well.
has_kernels() {
  "$python" -c "from rfkernels._C import build_info; raise SystemExit('$device' != 'cpu' and not build_info()['cuda'])" \
    2>/dev/null
}
if ! has_kernels; then
  echo "building the kernels"
  cmake -S . -B build/leg -G Ninja -DCMAKE_BUILD_TYPE=Release -DRFK_OUTPUT_DIRECTORY="$PWD/rfkernels" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    >"$out/build.log" 2>&1 && timeout 240 cmake --build build/leg >>"$out/build.log" 2>&1 ||
    { tail -5 "$out/build.log" >&2; echo "train_embedded: the kernels cannot be built here" >&2; exit 2; }
  rm -f "$out/build.log"
fi

"$python" -m bench.train_leg "${arguments[@]}" || exit $?
[ "${SCORES:-1}" = 0 ] && exit 0
weights=$(find "$out" -maxdepth 1 -name '*.safetensors' -newermt "@$begun" | head -n 1)
left=$(("$(date +%s)" - begun))
echo "scores, after $left s"
timeout 60 "$python" - "$weights" "$device" "$pack" >"$out/scores.json" <<'PYTHON' || echo "no scores in 60 s"
import json
import sys
from pathlib import Path

from rfkernels.evaluation.emoji import evaluate

weights, device, pack = sys.argv[1:]
print(json.dumps(evaluate(weights, device=device, data=Path(pack) if pack else None, quick=True), default=str))
PYTHON
exit 0
