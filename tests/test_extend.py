"""The examples of docs/extend.md, put into a copy of the project and run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")
BLOCK = re.compile(r"^```\w+\n# ([\w/.]+)(?:, (at its end|before \"([^\n]+)\"))?:\n(.*?)^```$", re.M | re.S)

DESK = [{"customer": f"where is parcel {n}?", "agent": f"parcel {n} is on its way."} for n in range(24)]
DESK[7]["agent"] += " it will take a day or two, or three at the most." * 2


@pytest.fixture(scope="module")
def extended(fixtures_dir, tmp_path_factory):
    """A copy of the project with all blocks in it, some records, and a small model in runs/chat."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("minimind_jax", "configs", "tests/losses"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, place, anchor, text in BLOCK.findall(PAGE):
        put(folder / name, place, anchor, text)
    with tarfile.open(fixtures_dir / "version_0_1.tar.xz") as archive:
        archive.extractall(folder, filter="data", members=[m for m in archive if m.name.startswith("kept/runs/chat")])
    shutil.move(folder / "kept" / "runs", folder / "runs")
    (folder / "desk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in DESK))
    return folder


def put(file, place, anchor, text):
    if not place:
        assert not file.exists(), f"{file} is there already"
        file.write_text(text, "utf-8")
        return
    before = file.read_text("utf-8")
    if anchor:
        at = f"\n{before}".find(f"\n{anchor}")
        assert at >= 0, f"{file} has no line that begins with {anchor!r}"
        file.write_text(before[:at] + text + before[at:], "utf-8")
    else:
        file.write_text(before + text, "utf-8")


def run(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder), "MINIMIND_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name for name, *_ in BLOCK.findall(section)}


def test_few_files_are_touched():
    assert len(BLOCK.findall(PAGE)) == PAGE.count("\n```python") + PAGE.count("\n```yaml")
    assert files_of("A record format") == {"minimind_jax/data/formats.py"}  # and its test
    assert len(files_of("A loss")) == 2 and len(files_of("A stage")) == 4 and len(files_of("A command")) == 3


def test_the_loss_passes_its_test(extended):
    assert "2 passed" in run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/losses/test_focal.py")


def test_the_stage_trains_on_the_format(extended):
    words = ["--init_from", "runs/chat", "--data.train", "desk.jsonl", "--data.seq_len", "64", "--training.steps", "3"]
    sizes = ["--training.batch_tokens", "128", "--training.log_every", "1", "--data.val_fraction", "0.2"]
    told = run(extended, "-m", "minimind_jax", "focal", "--config", "focal", "--run", "runs/hard", *words, *sizes)
    assert "chat --model runs/hard/model" in told
    rows = [json.loads(line) for line in (extended / "runs/hard/metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["hardness"] < 1 and row["loss"] < row["nll"] for row in rows if "loss" in row)
    assert "hardness" in (extended / "runs/hard/report.md").read_text()


def test_the_command_is_there(extended):
    assert run(extended, "-m", "minimind_jax", "data", "longest", "desk.jsonl", "--count", "1").startswith(
        "desk.jsonl:8: "
    )
    assert "data longest" in run(extended, "-m", "minimind_jax", "--help")
