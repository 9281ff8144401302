"""`scripts/gpu_check.sh`: what it would run, within which time, and what becomes of the rest where one part fails."""

import json
import os
import subprocess
import sys
import time
import typing

import pytest

from minimind_jax.model import attention, moe
from tests.conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
import gpu_check
from gpu_check_table import write_table


def test_a_dry_run_lists_the_parts_with_their_limits_and_all_paths_of_the_code():
    environment = {**os.environ, "DRY_RUN": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "scripts/gpu_check.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    on_gpu, without = done.stdout.split("# without one")
    assert "ends after 15 minutes" in on_gpu and "ends after 12 minutes" in without
    for path in typing.get_args(attention.Path):
        wanted = path not in ("auto", "reference") and attention.FUSED.get(path, "gpu") == "gpu"
        assert (f"train, attention {path}\n" in on_gpu) == wanted
    for path in set(typing.get_args(moe.Path)) - {"auto", "reference"}:
        assert f"train, experts {path}\n" in on_gpu
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert all(0 < int(line.split()[0]) <= 180 for line in lines if line.strip() and "minutes" not in line)


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
