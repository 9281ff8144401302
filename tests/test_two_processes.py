"""Whole commands in two processes that form a JAX cluster, as on two hosts with a shared disk."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import read_metrics

pytestmark = pytest.mark.slow

PIPELINE = {
    "name": "pair",
    "shared": {
        "seed": 3,
        "data.seq_len": 32,
        "training.batch_tokens": 128,
        "data.cache_dir": "cache",
        "export_dtype": "float32",
    },
    "stages": [
        {"tokenizer": {"data": ["text.jsonl"], "vocab_size": 300}},
        {
            "pretrain": {
                "model": {
                    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300},
                    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
                },
                "data": {"train": ["text.jsonl"], "val_fraction": 0.2},
                "training": {"steps": 6, "log_every": 1},
                "samples": {"prompts": ["The cat"], "max_new_tokens": 4},
            }
        },
    ],
}


@pytest.fixture
def folder(tmp_path):
    lines = [f'{{"text": "The {animal} sleeps {n} hours."}}\n' for n in range(40) for animal in ("cat", "dog", "owl")]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    return tmp_path


def start_pair(folder, *arguments):
    """`minimind ARGUMENTS` in each of two processes with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_PLATFORMS": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minimind_jax", *arguments],
            env={**os.environ, **cluster, "JAX_PROCESS_ID": str(index)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def outputs(processes, *codes):
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode in codes for process in processes] == [True, True], "\n----\n".join(texts)
    return texts


def test_a_pipeline_in_two_processes_does_what_one_does(folder):
    first, second = outputs(start_pair(folder, "pipeline", "--config", "pipe.yaml"), 0)
    assert "[1/2] tokenizer: " in first and "The model is " in first
    assert "tokenizer" not in second and "The model is " not in second
    alone = [sys.executable, "-m", "minimind_jax", "pipeline", "--config", "pipe.yaml", "--name", "alone"]
    subprocess.run(alone, cwd=folder, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, capture_output=True)

    pair, one = (RunFolder(folder / "runs" / name / "pretrain") for name in ("pair", "alone"))
    assert Tokenizer.load(folder / "runs/pair/tokenizer").vocab_size == 300
    for got, expected in zip(read_metrics(pair.metrics_file), read_metrics(one.metrics_file), strict=True):
        for key in ("loss", "val_loss", "tokens"):
            np.testing.assert_allclose(got.get(key, 0), expected.get(key, 0), rtol=1e-5, err_msg=key)

    first, second = outputs(start_pair(folder, "pipeline", "--config", "pipe.yaml"), 0)
    assert first.count("done, in") == 2 and "done, in" not in second


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_that_is_asked_to_stop_stops_both_with_everything_saved(folder, number):
    long = ["pipeline", "--config", "pipe.yaml", "--pretrain.training.steps", "100000"]
    processes = start_pair(folder, *long)
    run = RunFolder(folder / "runs/pair/pretrain")
    deadline = time.monotonic() + 120
    while not any(row.get("loss") for row in read_metrics(run.metrics_file)):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.2)
    os.kill(processes[1].pid, number)
    texts = outputs(processes, 128 + signal.SIGTERM)
    (step,) = run.checkpoint_steps()
    assert f"stopped at step {step} of 100000" in texts[0]
