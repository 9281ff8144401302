#!/usr/bin/env bash
# What fifteen minutes with a GPU can show, in order of worth, each part within a time limit and whatever becomes of the
# others; where there is no GPU, what can be compiled for one and for TPUs, in twelve minutes.
#
#   scripts/gpu_check.sh [--out FOLDER] [--minimind CHECKOUT] [--minimind_python PYTHON]
#
# FOLDER (runs/gpu_check) gets results.jsonl, results.md for docs/performance.md, and a log of each part. CHECKOUT: of
# jingyaogong/minimind, to be measured beside ours, by a PYTHON that has torch with CUDA, transformers and datasets.
# MINIMIND_CUDA_PYTHON, MINIMIND_TPU_PYTHON: Pythons with those compilers, where this one has not.   DRY_RUN=1: list parts
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
exec python scripts/gpu_check.py "$@"
