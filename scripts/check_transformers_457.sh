#!/usr/bin/env bash
# Checks exported folders with transformers 4.57.6, in an environment of its own (the test suite runs the newest 5.x):
# loading with no tensor missing or left over, logits to 1e-4, generate(**tokenizer(text)) with our greedy text, and
# folders that 4.57 wrote coming back bit for bit; dense and mixture of experts (k = 1, 2), tied and untied, YaRN.
#
#   scripts/check_transformers_457.sh [VENV]         VENV: where the environment is made or reused, .venv-457 by default
#
# PYTHON           the interpreter the environment is made with (the first found that is new enough)
# TORCH_INDEX_URL  where torch comes from; https://download.pytorch.org/whl/cpu has the small CPU build
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-457}

[ -x "$venv/bin/python" ] || "$(scripts/find_python.sh ${PYTHON:+"$PYTHON"})" -m venv "$venv"
# torch first, so that nothing else chooses its version
"$venv/bin/pip" install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
"$venv/bin/pip" install --quiet transformers==4.57.6 pytest -e '.[vision,gguf]'
JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest tests/convert/test_transformers.py tests/convert/test_vision_transformers.py \
  tests/inference/test_engine_images.py \
  tests/stages/test_image_classifier.py::test_transformers_tells_the_same_of_the_same_pictures -q -s -p no:cacheprovider
