# make demo    a model learns from real text, chats, and is exported       make test    the tests
# make chat    the demo's model in a browser
# All set themselves up from a bare Python 3.11 or newer, and are quick to repeat.
#
#   PYTHON=python3.13                another Python, with a virtual environment of its own
#   ACCELERATOR=cuda12|cuda13|tpu    JAX for a GPU or TPU, in a virtual environment of its own
#   PARITY=0|1                       tests: install torch and transformers to compare with (1 on Python 3.11)
#   JOBS=2                           tests: processes

PYTHON ?=
ACCELERATOR ?=
JOBS ?= 2

VENV := .venv$(if $(PYTHON),-$(notdir $(PYTHON)))$(if $(ACCELERATOR),-$(ACCELERATOR))
BIN := $(VENV)/bin
ifndef PARITY
PARITY := $(shell $$(scripts/find_python.sh $(PYTHON)) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')
endif
PIP_INSTALL = $(BIN)/python -m pip install --quiet
accelerated = $(if $(ACCELERATOR),$(ACCELERATOR)$(comma))
comma := ,

test test-slow: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
# Every process, of which the tests start hundreds, would compile the sources for itself.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo chat .a-model test test-slow lint format wheel clean

demo: $(VENV)/.demo
	$(BIN)/minimind demo

chat: .a-model $(VENV)/.serve
	$(BIN)/minimind serve --model runs/demo/model --web --open

.a-model:
	@test -d runs/demo/model || { echo "there is no model yet; make demo trains one"; exit 1; }

test: $(VENV)/.test-parity$(PARITY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.test-parity$(PARITY)
	$(BIN)/python -m pytest -x -n $(JOBS) -m slow

lint: $(VENV)/.test-parity$(PARITY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test-parity$(PARITY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.test-parity$(PARITY)
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-* .cache build dist *.egg-info

$(VENV)/.python: scripts/find_python.sh
	"$$(scripts/find_python.sh $(PYTHON))" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml Makefile
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(PIP_INSTALL) --editable ".[$(accelerated)demo,gguf]"
	@touch $@

$(VENV)/.serve: $(VENV)/.python pyproject.toml Makefile
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(PIP_INSTALL) --editable ".[$(accelerated)demo,serve,gguf]"
	@touch $@

$(VENV)/.test-parity$(PARITY): $(VENV)/.python pyproject.toml
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(PIP_INSTALL) --editable ".[$(accelerated)test$(if $(filter 1,$(PARITY)),$(comma)parity)]"
	@touch $@
