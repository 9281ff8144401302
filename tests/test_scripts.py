"""Scripts for machines that are not here print, with DRY_RUN=1, commands that exist; they were not run there."""

import os
import shlex
import shutil
import subprocess
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
    started = shlex.split(remote[remote.index("scripts/") : remote.index(">>")])
    assert started == ["scripts/train_pretrain.py", "--run", "gs://b/my run", "--resume", "auto"]


@pytest.mark.parametrize("arguments", [[], ["create"], ["run", "pod", "nothing"], ["other", "pod"]])
def test_tpu_vm_says_what_it_takes(arguments):
    done = subprocess.run([ROOT / "scripts/tpu_vm.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr


def test_slurm_starts_one_process_a_gpu():
    (command,) = dry_run("slurm.sbatch", "sft", "--run", "a b")
    assert command[0] == "srun" and command[-5:] == ["scripts/train_sft.py", "--run", "a b", "--resume", "auto"]
    text = (ROOT / "scripts/slurm.sbatch").read_text()
    assert "--ntasks-per-node=8" in text and "--gpus-per-node=8" in text and "--signal=TERM@" in text


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (2, False), (0, False)])
def test_slurm_puts_a_run_that_saved_itself_back_into_the_queue(tmp_path, status, requeued):
    for name, text in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", ROOT / "scripts/slurm.sbatch", "sft"], env=environment)
    assert done.returncode == status
    assert (tmp_path / "said").exists() == requeued
