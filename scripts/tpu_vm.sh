#!/usr/bin/env bash
# A Cloud TPU VM, one host or many, from the machine you sit at. Needs gcloud, logged in, with a project and a zone.
#
#   scripts/tpu_vm.sh create NAME                    a TPU VM of type $TYPE
#   scripts/tpu_vm.sh install NAME                   this checkout and its packages, on every worker
#   scripts/tpu_vm.sh copy NAME FILE...              files and folders into ~/minimind_jax/data of every worker
#   scripts/tpu_vm.sh run NAME STAGE ARGUMENTS...    starts scripts/train_STAGE.py on every worker and returns
#   scripts/tpu_vm.sh log NAME                       what the first worker prints (Ctrl-C leaves the run alone)
#   scripts/tpu_vm.sh stop NAME                      asks the run to save its state and end
#   scripts/tpu_vm.sh resume NAME STAGE ARGUMENTS... run; before it, if the TPU VM was taken away, a new one and install
#   scripts/tpu_vm.sh delete NAME
#
# TYPE (v5litepod-8)  VERSION (v2-alpha-tpuv5-lite)  ZONE, PROJECT (gcloud's own)  SPOT=1: cheaper, may be taken away
# FILES: what `resume` copies to a new TPU VM     DRY_RUN=1: print the commands and run none
#
# The tokenizer is trained where you sit (minimind tokenizer) and copied like the data. The run's folder is in a bucket:
# all workers write there, and it outlives the TPU VM. So, after create and install:
#
#   scripts/tpu_vm.sh copy NAME text.jsonl runs/tokenizer
#   scripts/tpu_vm.sh run NAME pretrain --config pretrain --data.train data/text.jsonl --tokenizer data/tokenizer \
#       --run gs://BUCKET/runs/a
set -euo pipefail
cd "$(dirname "$0")/.."

TYPE=${TYPE:-v5litepod-8}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
place=(${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"})

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

tpu() { do_it gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"; }

everywhere() { tpu ssh --worker=all --command="$1"; }

create() { tpu create --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}; }

install() {
    do_it git archive --format=tar.gz --output=/tmp/minimind_jax.tar.gz HEAD
    do_it gcloud compute tpus tpu-vm scp /tmp/minimind_jax.tar.gz "$name": "${place[@]}" --worker=all
    # uv brings a Python that is new enough; the images' own may be older than 3.11.
    everywhere "mkdir -p minimind_jax/data && tar xzf minimind_jax.tar.gz -C minimind_jax \
&& cd minimind_jax && { command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } \
&& ~/.local/bin/uv venv --allow-existing --python 3.12 .venv \
&& ~/.local/bin/uv pip install --python .venv -e '.[tpu,gcs]'"
}

copy() {
    [ $# -eq 0 ] || do_it gcloud compute tpus tpu-vm scp --recurse "$@" "$name":minimind_jax/data/ "${place[@]}" --worker=all
}

# The workers find each other by the TPU VM's metadata, which MINIMIND_DISTRIBUTED=1 asks for.
run() {
    local stage=$1 arguments=""
    [ $# -eq 1 ] || arguments=$(printf ' %q' "${@:2}")
    everywhere "cd minimind_jax && if grep -qs scripts/train_ /proc/\$(cat train.pid 2> /dev/null)/cmdline; then \
echo 'a run is going on; stop it first' >&2; exit 1; fi && { MINIMIND_DISTRIBUTED=1 setsid nohup .venv/bin/python \
scripts/train_$stage.py$arguments --resume auto >> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

# READY, PREEMPTED ..., NOT_FOUND where there is none. Fails where gcloud does for another reason.
state() {
    local file errors status=0
    file=$(mktemp)
    gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2> "$file" || status=$?
    errors=$(cat "$file")
    rm "$file"
    if [ "$status" -eq 0 ]; then
        return
    elif [[ $errors == *NOT_FOUND* || $errors == *"was not found"* ]]; then
        echo NOT_FOUND
    else
        echo "$errors" >&2
        return 1
    fi
}

resume() {
    local found
    if [ -n "${DRY_RUN:-}" ]; then
        echo "# if the TPU VM $name is PREEMPTED or TERMINATED (else without delete, create, install and copy):"
        tpu delete --quiet
    else
        found=$(state)
        case $found in
            READY) run "$@"; return ;;
            PREEMPTED | TERMINATED) tpu delete --quiet ;;
            NOT_FOUND) ;;
            *) echo "the TPU VM $name is $found, so it is left alone; wait, or start or delete it yourself" >&2; exit 1 ;;
        esac
    fi
    create
    install
    # shellcheck disable=SC2086  # several files
    copy ${FILES:-}
    run "$@"
}

if [ $# -lt 2 ]; then
    sed -n '2,/^set /p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
    exit 2
fi
command=$1 name=$2
shift 2
case $command in
    create | install) "$command" ;;
    copy) copy "$@" ;;
    run | resume)
        if [ ! -f "scripts/train_${1:-}.py" ] || [ "$1" = tokenizer ]; then
            echo "$command needs a stage, one of $(echo scripts/train_*.py); the tokenizer is trained on one machine and \
copied" >&2
            exit 2
        fi
        "$command" "$@"
        ;;
    log) tpu ssh --worker=0 --command="tail -n 50 -f minimind_jax/train.log" ;;
    stop) everywhere "kill -TERM \$(cat minimind_jax/train.pid)" ;;
    delete) tpu delete --quiet ;;
    *) echo "unknown command $command; scripts/tpu_vm.sh alone lists them" >&2; exit 2 ;;
esac
