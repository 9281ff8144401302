#!/usr/bin/env bash
# The first hour with few records, as docs/few_records.md tells it: 300 chats, 40 chats (LoRA), 200 tickets of 6 queues,
# 60 texts, 30 pairs, each with its documented command and nothing set. Fails where a model does not learn them.
#
#   scripts/first_hour.sh [BASE]        BASE: a model to start from; without one a small one is made of the demo's text
#
# WORK (runs/first_hour): where all of it goes.
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:$(cd "$scripts/.." && pwd)/.venv/bin
python=$(dirname "$(command -v minimind)")/python # the one that has minimind_jax
work=${WORK:-runs/first_hour}
mkdir -p "$work"

timed() {
    local TIMEFORMAT="==> %0R seconds, %0U + %0S of the processor: ${*:1:2}"
    time "$@"
}

check() {
    "$python" "$scripts/first_hour_check.py" "$@"
}

make_base() {
    "$python" -c 'from minimind_jax.demo import corpus, story; corpus.write_data(story.FOLDER / "data")'
    sed '/^  - sft:/,$d' "$scripts/../configs/quickstart.yaml" >"$work/base.yaml"
    timed minimind pipeline --config "$work/base.yaml" --name first_hour_base \
        --tokenizer.data runs/demo/data/pretrain.jsonl runs/demo/data/sft.jsonl
}

base=${1:-runs/first_hour_base/pretrain}
[ $# -gt 0 ] || make_base
"$python" "$scripts/first_hour_data.py" "$work"

timed minimind sft --config sft --init_from "$base" --data.train "$work/chats.jsonl" --run "$work/chats"
minimind generate --model "$work/chats" --input "$work/chats.jsonl" --output "$work/answers.jsonl" --temperature 0
check answers 0.6 "$work/chats.jsonl" "$work/answers.jsonl"

timed minimind sft --config lora --init_from "$work/chats" --data.train "$work/staff.json" --run "$work/staff"
minimind generate --model "$work/staff" --input "$work/staff.json" --output "$work/staff.jsonl" --temperature 0
check answers 0.5 "$work/staff.json" "$work/staff.jsonl"

timed minimind classify --config classify --init_from "$base" --data.train "$work/tickets.csv" --run "$work/queues"
minimind classify predict --model "$work/queues" --input "$work/new_tickets.csv" --output "$work/queues.jsonl"
check labels 0.9 "$work/new_tickets.csv" "$work/queues.jsonl"

timed minimind reward --config reward --init_from "$work/chats" --data.train "$work/pairs.jsonl" --run "$work/reward"
for side in chosen rejected; do
    minimind score --model "$work/reward" --input "$work/$side.jsonl" --output "$work/$side.scores.jsonl"
done
check order 0.8 "$work/chosen.scores.jsonl" "$work/rejected.scores.jsonl"

timed minimind dpo --config dpo --init_from "$work/chats" --data.train "$work/pairs.jsonl" --run "$work/dpo"
check metric 0.8 rewards/accuracies "$work/dpo/metrics.jsonl"

timed minimind pretrain --config pretrain --init_from "$base" --data.train "$work/texts" --run "$work/texts_model"
echo "==> all of it was learned"
