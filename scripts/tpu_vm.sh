#!/usr/bin/env bash
# A Cloud TPU VM, one host or many, from the machine you sit at. Needs gcloud, logged in, with a project and a zone.
#
#   scripts/tpu_vm.sh create NAME                    a TPU VM of type $TYPE
#   scripts/tpu_vm.sh install NAME                   this checkout and its packages, on every worker
#   scripts/tpu_vm.sh copy NAME FILE...              data files into ~/minimind_jax/data of every worker
#   scripts/tpu_vm.sh run NAME STAGE ARGUMENTS...    starts scripts/train_STAGE.py on every worker and returns
#   scripts/tpu_vm.sh log NAME                       what the first worker prints (Ctrl-C leaves the run alone)
#   scripts/tpu_vm.sh stop NAME                      asks the run to save its state and end
#   scripts/tpu_vm.sh resume NAME STAGE ARGUMENTS... a new TPU VM if the old one was taken away; then install and run
#   scripts/tpu_vm.sh delete NAME
#
# TYPE (v5litepod-8)  VERSION (v2-alpha-tpuv5-lite)  ZONE, PROJECT (gcloud's own)  SPOT=1: cheaper, may be taken away
# FILES: data files that `resume` copies to a new TPU VM     DRY_RUN=1: print the commands and run none
#
# A run outlives its TPU VM when its folder is in a bucket: run NAME pretrain --config pretrain --run gs://BUCKET/runs/a
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
    [ $# -eq 0 ] || do_it gcloud compute tpus tpu-vm scp "$@" "$name":minimind_jax/data/ "${place[@]}" --worker=all
}

# The workers find each other by the TPU VM's metadata, which MINIMIND_DISTRIBUTED=1 asks for.
run() {
    local stage=$1 arguments=""
    [ $# -eq 1 ] || arguments=$(printf ' %q' "${@:2}")
    everywhere "cd minimind_jax && { MINIMIND_DISTRIBUTED=1 setsid nohup .venv/bin/python \
scripts/train_$stage.py$arguments --resume auto >> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
}

state() { gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' || true; }

resume() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "# if the TPU VM $name is not READY:"
    elif [ "$(state)" = READY ]; then
        run "$@"
        return
    fi
    tpu delete --quiet || true # what is left of one that was taken away
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
        if [ ! -f "scripts/train_${1:-}.py" ]; then
            echo "$command needs a stage, one of $(echo scripts/train_*.py)" >&2
            exit 2
        fi
        "$command" "$@"
        ;;
    log) tpu ssh --worker=0 --command="tail -n 50 -f minimind_jax/train.log" ;;
    stop) everywhere "kill -TERM \$(cat minimind_jax/train.pid)" ;;
    delete) tpu delete --quiet ;;
    *) echo "unknown command $command; scripts/tpu_vm.sh alone lists them" >&2; exit 2 ;;
esac
