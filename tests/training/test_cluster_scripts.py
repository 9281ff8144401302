"""What `slurm.sbatch` and `tpu_vm.sh` start, started for real, with two tokenising processes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_jax.stages import STAGES
from minimind_jax.training.run import RunFolder

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = {path.stem.removeprefix("train_"): path for path in ROOT.glob("scripts/train_*.py")}
# Slurm's srun starts the command that follows its own options.
SRUN = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n'


def test_every_stage_that_trains_a_model_has_a_script():
    assert SCRIPTS.keys() == {stage.replace("-", "_") for stage in STAGES}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda path: path.stem)
def test_a_process_that_imports_a_script_starts_no_run(script, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(script), "--no_such_setting", "1"])
    runpy.run_path(str(script), run_name="__mp_main__")


# Those that see need a tower besides; those that learn from reward tokenise prompts one by one.
OTHER = ("tokenizer", "pretrain", "vlm-pretrain", "vlm-sft", "grpo", "ppo", "agent")
ADAPTING = [stage for stage in STAGES if stage not in OTHER]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", *ADAPTING])
def test_slurm_runs_a_stage_with_two_tokenising_processes(stage, world, files, request, tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    train = {"dpo": files["pairs"], "reward": files["pairs"], "classify": files["labels"]}
    file = train.get(stage, str(world.folder / ("text.jsonl" if stage == "pretrain" else "chat.jsonl")))
    run = RunFolder(tmp_path / "run")
    arguments = ["--run", run.path, "--data.train", file, "--data.tokenizer_workers", "2"]
    arguments += ["--data.cache_dir", tmp_path / "cache", "--data.seq_len", "64"]
    arguments += ["--training.steps", "2", "--training.batch_tokens", "256", "--optimizer.warmup_steps", "0"]
    if stage == "pretrain":
        model = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
        arguments += ["--tokenizer", world.folder / "tokenizer", *(f"--model.{k}={v}" for k, v in model.items())]
    else:
        base = request.getfixturevalue("base")
        arguments += ["--init_from", base, *(["--teacher.model", base] if stage == "distill" else [])]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", ROOT / "scripts/slurm.sbatch", stage, *map(str, arguments)]
    done = subprocess.run(command, env={**environment, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.model.is_dir() and "with 2 processes" in done.stderr
