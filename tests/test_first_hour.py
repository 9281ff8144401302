"""The first hour with few records: the documented commands, with nothing set, learn what they are given."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_few_records_are_learned_by_the_documented_commands(tmp_path):
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [ROOT / "scripts" / "first_hour.sh"],
        cwd=tmp_path, env={**os.environ, "PATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("==> ")]
    print("\n".join(told))
    assert done.returncode == 0, done.stdout[-6000:]
    # Five minutes of two cores: the clock itself would measure what else the machine does.
    found = re.findall(r"==> .* seconds, (\d+) \+ (\d+) of the processor: (.*)", done.stdout)
    assert len(found) == 7, told
    assert max(int(user) + int(system) for user, system, _ in found) <= 600, told


def test_the_data_is_the_same_every_time_and_what_is_held_out_differs(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, ROOT / "scripts" / "first_hour_data.py", tmp_path / name], check=True)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    known, new = ((tmp_path / "one" / name).read_text().splitlines()[1:] for name in ("tickets.csv", "new_tickets.csv"))
    assert (len(known), len(new)) == (200, 120) and not set(known) & set(new)
    assert len({line.rpartition(";")[2] for line in known}) == 6
    assert sum(1 for file in files if file.parts[0] == "texts") == 60
