#!/usr/bin/env bash
# Formatters, linter and size check; the first argument is the Python to run them with.
set -euo pipefail
python=${1:-python3}
"$python" -m pip install -q ruff==0.17.6 clang-format==23.1.5
"$python" -m ruff format --check .
"$python" -m ruff check .
clang_format=$("$python" -c 'import clang_format; print(clang_format.__path__[0] + "/data/bin/clang-format")')
git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs "$clang_format" --dry-run --Werror
"$python" tools/check_size.py
