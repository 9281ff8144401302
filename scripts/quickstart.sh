#!/bin/sh
# A small model from your own files, minutes on a CPU: scripts/quickstart.sh TEXT.jsonl CHATS.jsonl [--STAGE.key value ...]
# TEXT has records {"text": ...}, CHATS {"conversations": [...]} (docs/data.md). Run it again to go on where it stopped.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
text=$1 chats=$2
shift 2
PATH=$PATH:$(cd "$(dirname "$0")/.." && pwd)/.venv/bin
minimind pipeline --config quickstart --name mine \
    --pretrain.data.train "$text" --sft.data.train "$chats" "$@"
echo "Talk with it: $(command -v minimind) chat --model runs/mine"
