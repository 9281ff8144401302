"""Scripts for machines that are not here: with DRY_RUN=1 they print commands that exist, and with stand-ins for the
programs of such machines they do what these ask for. They were not run there."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_docs import check, commands

ROOT = Path(__file__).resolve().parent.parent
SHELL = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch")]


def dry_run(script, *arguments, **variables):
    """What the script prints, one list of words a command."""
    environment = {**os.environ, "DRY_RUN": "1", **variables}
    command = ["bash", ROOT / "scripts" / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [words for line in done.stdout.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_speedrun_plans_then_trains_evaluates_and_exports(capsys):
    lines = dry_run("speedrun.sh", "--sft.training.epochs", "1", DEVICE="h100", NAME="mine")
    names = [" ".join(words[1:3]) for words in lines if words[0] == "minimind"]
    assert [name.split()[0] for name in names] == [
        *("plan", "plan", "data", "pipeline", "evaluate", "evaluate", "generate", "convert")
    ]
    for words in commands("\n".join(shlex.join(words) for words in lines)):
        check(words, capsys)
    pipeline = next(words for words in lines if words[1] == "pipeline")
    assert pipeline[-2:] == ["--sft.training.epochs", "1"] and "data/mine/sft_t2t_mini.jsonl" in pipeline


def test_tpu_vm_brings_back_what_was_taken_away():
    lines = dry_run("tpu_vm.sh", "resume", "pod", "pretrain", "--run", "gs://b/my run", ZONE="z", FILES="a b", SPOT="1")
    assert ["delete", "create", "scp", "ssh", "scp", "ssh"] == [
        words[4] for words in lines if words[0] == "gcloud"
    ] and all("--zone=z" in words for words in lines if words[0] == "gcloud")
    remote = lines[-1][-1].removeprefix("--command=")
    assert "MINIMIND_DISTRIBUTED=1" in remote and "--worker=all" in lines[-1]
    started = shlex.split(remote[remote.rindex("scripts/train_") : remote.rindex(">>")])
    assert started == ["scripts/train_pretrain.py", "--run", "gs://b/my run", "--resume", "auto"]


@pytest.mark.parametrize("arguments", [[], ["create"], ["run", "pod", "nothing"], ["other", "pod"]])
def test_tpu_vm_says_what_it_takes(arguments):
    done = subprocess.run([ROOT / "scripts/tpu_vm.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr


def put_program(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


LOST = ["delete", "create", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("described", "then"),
    [
        ("echo READY; echo 'WARNING: an update is there' >&2", ["ssh"]),
        ("echo PREEMPTED", LOST),
        ("echo 'ERROR: NOT_FOUND: no such TPU' >&2; exit 1", LOST[1:]),
        ("echo CREATING", []),
        ("echo 'ERROR: please log in again' >&2; exit 1", []),
    ],
)
def test_tpu_vm_takes_a_new_one_only_for_one_that_is_gone(tmp_path, described, then):
    """With a stand-in for gcloud that writes down what it is asked to do."""
    put_program(tmp_path, "gcloud", f'[ "$4" != describe ] || {{ {described}; exit; }}; echo "$4" >> {tmp_path}/asked')
    put_program(tmp_path, "git", "exit 0")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "scripts/tpu_vm.sh", "resume", "pod", "pretrain"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    asked = tmp_path / "asked"
    assert (asked.read_text().split() if asked.exists() else []) == then
    assert (done.returncode == 0) == bool(then)
    if not then:
        assert "is CREATING, so it is left alone" in done.stderr or "please log in again" in done.stderr


def test_tpu_vm_starts_no_second_run_beside_the_first(tmp_path):
    """What every worker is told to do, done here; in place of the run a program that waits."""
    (tmp_path / "minimind_jax/.venv/bin").mkdir(parents=True)
    put_program(tmp_path / "minimind_jax/.venv/bin", "python", "while :; do sleep 0.1; done")
    remote = dry_run("tpu_vm.sh", "run", "pod", "sft")[0][-1].removeprefix("--command=")

    def start():
        return subprocess.run(["bash", "-c", remote], cwd=tmp_path, capture_output=True, text=True)

    def kill():
        process = Path("/proc", (tmp_path / "minimind_jax/train.pid").read_text().strip())
        os.kill(int(process.name), signal.SIGKILL)
        with contextlib.suppress(OSError):  # it is gone
            while (process / "cmdline").read_bytes():
                time.sleep(0.05)

    assert start().returncode == 0
    again = start()
    kill()
    assert again.returncode == 1 and "a run is going on" in again.stderr
    assert start().returncode == 0
    kill()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch"])
def test_the_tokenizer_is_no_stage_of_many_processes(script):
    arguments = ["run", "pod", "tokenizer"] if script == "tpu_vm.sh" else ["tokenizer"]
    done = subprocess.run(["bash", ROOT / "scripts" / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "the tokenizer" in done.stderr


def test_slurm_starts_one_process_a_gpu():
    (command,) = dry_run("slurm.sbatch", "sft", "--run", "a b")
    assert command[0] == "srun" and "--cpus-per-task=8" in command
    assert command[-5:] == ["scripts/train_sft.py", "--run", "a b", "--resume", "auto"]
    text = (ROOT / "scripts/slurm.sbatch").read_text()
    assert "--ntasks-per-node=8" in text and "--gpus-per-node=8" in text and "--signal=TERM@" in text


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (2, False), (0, False)])
def test_slurm_puts_a_run_that_saved_itself_back_into_the_queue(tmp_path, status, requeued):
    put_program(tmp_path, "srun", f"exit {status}")
    put_program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/said')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", ROOT / "scripts/slurm.sbatch", "sft"], env=environment)
    assert done.returncode == status
    assert (tmp_path / "said").exists() == requeued
