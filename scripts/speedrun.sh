#!/usr/bin/env bash
# MiniMind-3 "zero" from nothing on one GPU: download, pretrain, fine-tune, evaluate, export. Run it again to go on.
#
#   scripts/speedrun.sh [--STAGE.key value ...]        overrides of configs/zero.yaml
#
# NAME (speedrun): runs/NAME and data/NAME   DEVICE: for the estimate, as in docs/plan.md (the GPU here)
# HELD_OUT (2000): records at the end of each file that are evaluated and not trained   DRY_RUN=1: print, run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.venv-cuda12/bin:$PATH

NAME=${NAME:-speedrun}
HELD_OUT=${HELD_OUT:-2000}
run=runs/$NAME data=data/$NAME

do_it() {
    if [ -n "${DRY_RUN:-}" ]; then
        local word
        for word in "$@"; do
            [[ $word =~ ^[A-Za-z0-9_./:=-]+$ ]] || word=${word@Q}
            printf '%s ' "$word"
        done
        echo
    else
        "$@"
    fi
}

gpu() {
    case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) in
        *H100*) echo h100 ;;
        *A100*) echo a100 ;;
        *4090*) echo rtx4090 ;;
        *3090*) echo rtx3090 ;;
    esac
}

# Two epochs of 1.2 GB and of 1.6 GB at about 3.1 bytes a token; 40 % of the peak is an assumption of `minimind plan`.
estimate() {
    local device=${DEVICE:-$(gpu)}
    if [ -z "$device" ]; then
        echo "No estimate: this GPU has no name in docs/plan.md; DEVICE=rtx3090 asks for one of those that have."
        return
    fi
    do_it minimind plan --config zero --stage pretrain --device "$device" --tokens 774000000 || true
    do_it minimind plan --config zero --stage sft --device "$device" --tokens 1032000000 || true
}

# FILE -> $data/FILE to train on and $data/held_out_FILE; the training file is moved into place when it is complete.
split() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "# data/$1: the last $HELD_OUT records to $data/held_out_$1, the others to $data/$1"
    elif [ ! -f "$data/$1" ]; then
        mkdir -p "$data"
        tail -n "$HELD_OUT" "data/$1" >"$data/held_out_$1"
        head -n "-$HELD_OUT" "data/$1" >"$data/$1.part"
        mv "$data/$1.part" "$data/$1"
    fi
}

estimate
do_it minimind data download mini --target data
split pretrain_t2t_mini.jsonl
split sft_t2t_mini.jsonl
do_it minimind pipeline --config zero --name "$NAME" \
    --tokenizer.data "$data/sft_t2t_mini.jsonl" \
    --pretrain.data.train "$data/pretrain_t2t_mini.jsonl" --sft.data.train "$data/sft_t2t_mini.jsonl" "$@"
do_it minimind evaluate perplexity "$data/held_out_pretrain_t2t_mini.jsonl" --model "$run/pretrain"
do_it minimind evaluate perplexity "$data/held_out_sft_t2t_mini.jsonl" --model "$run/sft" \
    --kind conversation --seq_len 768
do_it minimind generate --model "$run/sft" --prompt "Who are you?" "为什么天空是蓝色的？" --temperature 0
do_it minimind convert to-hf "$run/sft" "$run/export" --dtype float16
echo "The model is $run/export; $run/sft/report.md has the curves. Talk with it: minimind chat --model $run/export"
