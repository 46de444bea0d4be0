# make demo   venv, build, a sheet of 36 pictures in out/
# make test   venv, build, every test
#
# PYTHON=python3.11   the interpreter of the virtual environment that is made
# VENV=none           install into PYTHON itself, without the network: torch and the tools must be there
# An active virtual environment is used as it is. RFK_CUDA=OFF skips the CUDA kernels.

PYTHON ?= python3
VENV ?= $(if $(VIRTUAL_ENV),active,.venv)
# On a new machine; an installed torch >= 2.6 is used as it is.
TORCH ?= torch==2.13.0

ifeq ($(VENV),none)
PY := $(PYTHON)
PIP_FLAGS := --no-build-isolation --no-deps
else ifeq ($(VENV),active)
PY := python
else
PY := $(VENV)/bin/python
endif

.PHONY: demo test bench install venv lint clean

demo: install
	$(PY) tools/demo.py

test: install
	$(PY) -m pytest

bench: install
	$(PY) -m bench

venv:
ifeq ($(filter none active,$(VENV)),)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
endif

install: venv
ifneq ($(VENV),none)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
endif
	$(PY) -m pip install -q $(PIP_FLAGS) -e ".[test]"

lint: venv
	bash tools/lint.sh $(PY)

clean:
	rm -rf build dist out *.egg-info rfkernels/*.so
