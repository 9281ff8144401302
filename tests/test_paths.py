"""Runs and models in an object store: a store in memory here, an emulator of Google Cloud Storage in the slow test.

The emulator (gcp-storage-emulator) answers the same requests as the real one; nothing was tried on the real one.
"""

import http.server
import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from minimind_jax import paths
from minimind_jax.config.sections import TrackingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder, resolve_run
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.paths import as_path, is_remote, local_folder
from minimind_jax.runs.report import write_report
from minimind_jax.stages import STAGES
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import (
    WALL_CLOCK,
    MetricsWriter,
    append_export,
    export_row,
    is_exported,
    read_metrics,
)


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket in this process's memory."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        store, pseudo_dirs, cachable = {}, [""], False

    store = Store()
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: store if name == "gcs" else fsspec.filesystem("file")
    )
    paths.local_folder.cache_clear()
    return "gs://bucket"


def test_a_disk_stays_pathlib(tmp_path):
    assert type(as_path(str(tmp_path))) is type(tmp_path) and not is_remote(as_path(tmp_path))
    assert local_folder(tmp_path) is tmp_path
    assert str(resolve_run("name")) == "runs/name"


def test_a_run_folder_in_a_store(bucket):
    run = RunFolder(resolve_run(f"{bucket}/runs/a")).create()
    run.lock()  # there is none
    config = PretrainConfig(tokenizer=f"{bucket}/tokenizer")
    run.check_resume("auto")
    run.write_config(config)
    assert run.changed_settings(config) == {} and str(run.path) == "gs://bucket/runs/a"
    for name in ("3", "6"):
        (run.checkpoints / name / "state").mkdir(parents=True)
        (run.checkpoints / name / "state" / "part").write_text("")
    (run.checkpoints / "3" / "commit_success.txt").write_text("")
    assert run.checkpoint_steps() == [3]  # 6 was cut off
    run.write_environment({"stage": "pretrain"})
    with MetricsWriter(run, TrackingConfig(), start_step=0, settings={}) as writer:
        writer.write(1, loss=2.0, learning_rate=0.1)
        assert read_metrics(run.metrics_file) == []
        writer.sync()
        assert len(read_metrics(run.metrics_file)) == 1
        writer.write(2, loss=1.0, learning_rate=0.1)
    assert [row["step"] for row in read_metrics(run.metrics_file)] == [1, 2]
    append_export(run, export_row(2, "float32"))
    assert len(read_metrics(run.metrics_file)) == 3 and not is_exported(run)
    assert write_report(run, STAGES).read_text().startswith("# Run a")
    assert run.loss_picture.read_bytes().startswith(b"\x89PNG")


def test_metrics_are_written_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(paths, "UPLOAD_SECONDS", 0)
    run = RunFolder(f"{bucket}/run")
    with MetricsWriter(run, TrackingConfig(), start_step=0, settings={}) as writer:
        for step in (1, 2):
            writer.write(step, loss=1.0)
            assert len(read_metrics(run.metrics_file)) == step


def test_a_model_is_replaced_whole_and_comes_back(bucket, tmp_path):
    tokenizer = train_bpe(["a b c"] * 50, tmp_path / "tokenizer", 300)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = ModelConfig(vocab_size=300, intermediate_size=64, **small)
    params = LanguageModel(config).init(jax.random.key(0))
    folder = as_path(f"{bucket}/runs/a/model")
    save_hf(folder, config, params, tokenizer, "float32", max_shard_bytes=50_000)
    sharded = {file.name for file in folder.iterdir()}
    (folder / "README.md").write_text("mine")
    save_hf(folder, config, params, tokenizer, "float32")
    assert {"model.safetensors.index.json", "config.json"} <= sharded
    assert not {name for name in sharded if "model-0" in name} & {file.name for file in folder.iterdir()}
    assert (folder / "README.md").read_text() == "mine"

    found = resolve_model_folder(f"{bucket}/runs/a")
    assert not is_remote(found) and json.loads((found / "config.json").read_text())["hidden_size"] == 32
    jax.tree.map(np.testing.assert_array_equal, load_hf(str(folder))[1], jax.device_get(params))
    assert Tokenizer.load(str(folder)).vocab_size == tokenizer.vocab_size
    other = as_path(f"{bucket}/other")
    (other / "file").write_text("")
    with pytest.raises(UserError, match="is not a model folder"):
        save_hf(other, config, params)


@pytest.mark.parametrize("name", ["nowhere://bucket/run", "s3://bucket/run"])
def test_other_stores_are_refused_with_a_reason(name):
    with pytest.raises(UserError, match=r"not known|cannot be used|on a disk or in Google Cloud Storage"):
        RunFolder(name)


# Google Cloud Storage as its emulator does it

TRAIN = """
pretrain --tokenizer tokenizer --data.train text.jsonl --data.val_fraction 0.2 --data.seq_len 32 --data.cache_dir cache
--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 1 --model.vocab_size 300
--model.num_attention_heads 2 --model.num_key_value_heads 1
--training.steps 12 --training.batch_tokens 128 --training.log_every 1 --training.eval_every 4 --checkpoint.every 4
--export_dtype float32
""".split()


@pytest.fixture
def cloud(monkeypatch):
    """Sends gs:// of the processes that are started to an emulator."""
    for package in ("gcsfs", "google.cloud.storage"):
        pytest.importorskip(package, reason=f"{package} is not installed (the gcs extra)")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    # One request at a time is too few: a client that holds a connection open would stop the others.
    monkeypatch.setattr(emulator.server, "HTTPServer", http.server.ThreadingHTTPServer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://127.0.0.1:{port}"
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, address)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    yield lambda: __import__("gcsfs").GCSFileSystem(endpoint_url=address, token="anon", use_listings_cache=False)
    server.stop()


@pytest.mark.slow
def test_a_run_in_cloud_storage_that_is_killed_ends_as_one_on_a_disk(cloud, tmp_path):
    lines = [f'{{"text": "The {animal} sleeps {n} hours."}}\n' for n in range(40) for animal in ("cat", "dog", "owl")]
    (tmp_path / "text.jsonl").write_text("".join(lines))

    def start(*arguments):
        command = [sys.executable, "-m", "minimind_jax", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(process):
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0, text[-3000:]
        return text

    finish(start("tokenizer", "--data", "text.jsonl", "--output", "tokenizer", "--vocab_size", "300"))
    finish(start(*TRAIN, "--run", "disk"))

    process, store = start(*TRAIN, "--run", "gs://bucket/runs/cloud"), cloud()
    while not store.exists("bucket/runs/cloud/checkpoints/4/commit_success.txt"):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "resumed" in finish(start(*TRAIN, "--run", "gs://bucket/runs/cloud"))

    finish(start("convert", "to-hf", "gs://bucket/runs/cloud", "copy", "--dtype", "float32"))
    finish(start("convert", "to-hf", "gs://bucket/runs/cloud", "saved", "--checkpoint", "newest"))
    disk = tmp_path / "runs" / "disk"
    for folder in ("copy", "saved"):
        written = (tmp_path / folder / "model.safetensors").read_bytes()
        assert written == (disk / "model" / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in store.cat("bucket/runs/cloud/metrics.jsonl").splitlines()]
    for got, expected in zip(rows, read_metrics(disk / "metrics.jsonl"), strict=True):
        keys = got.keys() - set(WALL_CLOCK)
        assert {key: got[key] for key in keys} == {key: expected[key] for key in keys}
