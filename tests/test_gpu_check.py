"""`scripts/gpu_check.sh`: what it would run, within which time, and what becomes of the rest where one part fails."""

import json
import os
import subprocess
import sys
import time
import typing

import jax.numpy as jnp
import pytest

from minimind_jax.model import attention, moe
from tests.conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
import gpu_check
from gpu_check_table import write_table


@pytest.fixture
def listed(monkeypatch, capsys):
    """What a dry run says, and its exit status."""

    def listed(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
        monkeypatch.setenv("DRY_RUN", "1")
        status, printed = gpu_check.main(), capsys.readouterr()
        return printed.out + printed.err, status

    return listed


def test_the_script_finds_its_python():
    environment = {**os.environ, "DRY_RUN": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "scripts/gpu_check.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "s  GPU tests\n" in done.stdout, done.stderr


def test_a_dry_run_lists_the_parts_with_their_limits_and_all_paths_of_the_code(listed):
    told, status = listed("--minimind", ROOT)
    assert status == 0, told
    on_gpu, without = told.split("# without one")
    assert "ends after 15 minutes" in on_gpu and "ends after 12 minutes" in without
    usual = attention.choose_path("auto", (32, 2048, 8, 96), 4, jnp.bfloat16, "gpu").path  # which `train` takes
    for path in typing.get_args(attention.Path):
        wanted = path not in ("auto", "reference", usual) and attention.FUSED.get(path, "gpu") == "gpu"
        assert (f"train, attention {path}\n" in on_gpu) == wanted
    usual = moe.choose_path("auto", 65_536, "gpu")
    for path in set(typing.get_args(moe.Path)) - {"auto", "reference", usual}:
        assert f"train, experts {path}\n" in on_gpu
    limits = [int(line.split()[0]) for line in on_gpu.splitlines() if not line.startswith("#")]
    assert min(limits) > 0 and sum(limits) <= 15 * 60  # or the last ones never run
    assert all(0 < int(line.split()[0]) <= 180 for line in without.splitlines()[1:])


def test_a_part_whose_packages_are_missing_says_what_installs_them(listed, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("MINIMIND_CUDA_PYTHON", raising=False)
    told, _ = listed("--parts", "GPU tests", "step that sees", "train", "H100: steps")
    install = f"{sys.executable} -m pip install -e '.[test]'"
    assert f"GPU tests  (no pytest: {install})" in told and f"(no pyarrow, PIL: {install})" in told
    assert "s  train\n" in told and ".venv-cuda12/bin/pip install -e '.[cuda12]', then MINIMIND_CUDA_PYTHON=" in told


def test_parts_are_chosen_by_name_or_by_what_has_no_result_yet(listed, tmp_path):
    told, status = listed("--parts", "generate", "paths", "--minutes", "2.5")
    assert status == 0 and told.count(" s  ") == 3 and "75 s  generate" in told and "after 2.5 minutes" in told
    told, status = listed("--parts", "train", "speed")
    assert status == 2 and "no part is called speed; there are: GPU tests; paths; train;" in told
    lines = [{"part": name, "status": status, **more} for name, status, more in (
        ("GPU tests", "passed", {}), ("paths", "failed", {}), ("train", "out of time", {"cut": "by the time of all"}),
        ("generate", "skipped", {}), ("data", "out of time", {}),
    )]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = listed("--out", tmp_path, "--go_on")[0].split("# without one")[0]
    assert [f" s  {name}\n" in left for name in ("GPU tests", "paths", "train", "generate", "data")] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert " s  train\n" in listed("--out", tmp_path)[0]  # anew


def test_what_there_is_no_time_for_is_run_when_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 1)

    def part(name, seconds, limit):
        line = json.dumps({"benchmark": "paths", "date": "2026-11-29", "path": name})
        return gpu_check.Part(
            name, limit, [sys.executable, "-c", f"import time; time.sleep({seconds}); print({line!r})"]
        )

    parts = [part("quick", 0, 30), part("slow", 60, 30), part("late", 0, 30)]
    went = gpu_check.run_parts(parts, 3.0, tmp_path, [])
    assert [told["status"] for told in went] == ["passed", "out of time", "skipped"]
    kept = gpu_check.read_results(tmp_path / "results.jsonl")
    left = gpu_check.chosen(parts, None, kept)
    assert [part.name for part in left] == ["slow", "late"]
    anew = {part.name for part in left}
    quick = [part(name, 0, 30) for name in ("slow", "late")]
    went = gpu_check.run_parts(quick, 60.0, tmp_path, [line for line in kept if line["part"] not in anew])
    assert [told["status"] for told in went] == ["passed", "passed"]
    written = gpu_check.read_results(tmp_path / "results.jsonl")
    assert [line["path"] for line in written if "path" in line] == ["quick", "slow", "late"]
    assert [line["part"] for line in written if "status" in line] == ["quick", "slow", "late"]
    table = (tmp_path / "results.md").read_text()
    assert table.count("passed") == 3 and "out of time" not in table


def run(tmp_path, code: str, limit: float = 30):
    part = gpu_check.Part("part", 30, [sys.executable, "-c", code])
    return gpu_check.run_part(part, limit, tmp_path / "log", dict(os.environ))


def test_what_a_part_prints_is_found_and_why_it_failed(tmp_path):
    line = {"benchmark": "paths", "path": "grouped"}
    went, found = run(tmp_path, f"print('a word'); print({json.dumps(json.dumps(line))})")
    assert went["status"] == "passed" and found == [{"part": "part", **line}]
    went, found = run(tmp_path, f"print({json.dumps(json.dumps(line))}); raise SystemExit('no such kernel')")
    assert (went["status"], went["why"]) == ("failed", "no such kernel") and len(found) == 1


def test_a_part_that_cannot_be_started_or_prints_no_text_stops_nothing(tmp_path):
    missing = gpu_check.Part("part", 30, [str(tmp_path / "python")])
    went, found = gpu_check.run_part(missing, 30, tmp_path / "log", dict(os.environ))
    assert went["status"] == "failed" and "No such file" in went["why"] and not found
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\n{\"benchmark\": \"cut o'); raise SystemExit('odd')"
    went, found = run(tmp_path, code)
    assert (went["status"], found) == ("failed", [])


def test_a_part_out_of_time_ends_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(child)!r}, "w").write(str(child.pid))
time.sleep(60)"""
    went, _ = run(tmp_path, code, limit=3)
    assert went["status"] == "out of time" and went["seconds"] < 15
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(int(child.read_text())):
        time.sleep(0.05)
    assert not _runs(int(child.read_text()))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("compared", [False, True])
def test_rates_become_a_table_with_the_other_side_where_there_is_one(tmp_path, compared):
    rate = {"ours": 650_900.4} | ({"minimind": 312_200.0, "ours / minimind": [2.09, 2.08],
                                   "median ours / minimind": 2.085} if compared else {})  # fmt: skip
    line = {"benchmark": "train", "part": "train", "machine": "H100", "jax": "0.11.2", "date": "2026-11-29"}
    line |= {"tokens per second": rate, "MFU": {"ours": 0.302}}
    path = {"benchmark": "paths", "part": "paths", "jax": "0.11.2", "date": "2026-11-29", "error of value": 0.00123}
    write_table(tmp_path / "table.md", [line, path], [{"part": "train", "status": "failed", "why": "a|b"}])
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if "|" in line]
    sides = ["minimind", "ours / minimind"] if compared else []
    assert ["task", "what", "ours", *sides, "MFU"] in rows
    expected = [
        "train",
        "tokens per second",
        "650,900",
        *(["312,200", "2.08 (2.09, 2.08)"] if compared else []),
        "30.2%",
    ]
    assert expected in rows and ["paths", "0.00123"] in rows
    assert any("failed: a/b" in cell for row in rows for cell in row)
