#!/usr/bin/env bash
# Proves the package as a user gets it: sdist -> wheel -> clean environment -> a picture, away from the checkout.
# Without CUDA kernels, to be quick: the checkout's own build has them.
set -euo pipefail
python=${1:-python3}
torch=${TORCH:-torch==2.13.0}
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install -q build
"$python" -m build --sdist --outdir "$work" . >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
RFK_CUDA=OFF "$python" -m pip wheel -q --no-deps -w "$work" "$work"/rfkernels-*.tar.gz
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "$torch"
"$work/venv/bin/pip" install -q "$(ls "$work"/rfkernels-*.whl)[cli]"

cd "$work"
venv/bin/python -c "import rfkernels.ops, sys; assert '$root' not in rfkernels.__file__, rfkernels.__file__"
venv/bin/rfkernels doctor
venv/bin/rfkernels generate "a red heart" --steps 4 --seed 1 -o heart.png
test -s heart.png
venv/bin/rfkernels show heart.png
ls -l "$work"/rfkernels-*.whl "$work"/rfkernels-*.tar.gz
echo "package: fine"
