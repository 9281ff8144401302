#!/usr/bin/env bash
# What fifteen minutes with a GPU can show, in order of worth, each part within a time limit and whatever becomes of the
# others; where there is no GPU, what can be compiled for one and for TPUs, in twelve minutes.
#
#   scripts/gpu_check.sh [--out FOLDER] [--minimind CHECKOUT] [--minimind_python PYTHON]
#   scripts/gpu_check.sh --minutes 9.5       # where a call may take ten minutes: as much of it as there is time for,
#   scripts/gpu_check.sh --minutes 5 --go_on # and what is left, beside the results that are there
#   scripts/gpu_check.sh --parts train generate
#
# FOLDER (runs/gpu_check) gets results.jsonl and results.md for docs/performance.md, both as each part ends, and a log of
# each. CHECKOUT: of jingyaogong/minimind, to be measured beside ours, by a PYTHON that has torch with CUDA, transformers
# and datasets.
# Tests and pictures want the extra `test`: pip install -e '.[cuda12,test]'.
# MINIMIND_CUDA_PYTHON, MINIMIND_TPU_PYTHON: Pythons with those compilers, where this one has not.   DRY_RUN=1: list parts
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
exec python scripts/gpu_check.py "$@"
