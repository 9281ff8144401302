"""Huge pages: the program starts anew once, and only where it can help."""

import os
import subprocess
import sys

import pytest

from minimind_jax import huge_pages
from minimind_jax.__main__ import STEADY
from minimind_jax.stages import KINDS

PRINT = """
import os, sys
from minimind_jax.huge_pages import use_huge_pages
use_huge_pages(keep=True)
use_huge_pages(keep=True)
environ = open("/proc/self/environ").read().replace("\\0glibc.", ":glibc.")  # which some glibc cut when they read it
started = dict(each.split("=", 1) for each in environ.split("\\0") if each)
print(started.get("GLIBC_TUNABLES"), *sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


def run(**environment):
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MINIMIND_HUGE_PAGES")}
    command = [sys.executable, "-c", PRINT, "a b", "--c"]
    return subprocess.run(command, env={**env, **environment}, check=True, stdout=subprocess.PIPE, text=True).stdout


OURS = ":".join(f"{name}={value}" for name, value in (huge_pages.TUNABLES | huge_pages.KEEPING).items())


@pytest.mark.skipif(not huge_pages._is_possible(), reason="no glibc that reads GLIBC_TUNABLES")
def test_the_program_starts_anew_with_its_arguments():
    """And what it starts itself does not have its settings."""
    assert run() == f"{OURS} a b --c \n"
    assert run(GLIBC_TUNABLES="glibc.malloc.check=1") == f"glibc.malloc.check=1:{OURS} a b --c glibc.malloc.check=1\n"


@pytest.mark.skipif(not huge_pages._is_possible(), reason="no glibc that reads GLIBC_TUNABLES")
def test_what_the_user_sets_stays():
    own = "glibc.malloc.arena_max=4"
    assert run(GLIBC_TUNABLES=own) == f"{own}:{OURS.replace(':glibc.malloc.arena_max=1', '')} a b --c {own}\n"
    assert run(MINIMIND_HUGE_PAGES="0") == "None a b --c None\n"


def test_memory_is_kept_by_the_stages_whose_steps_take_the_same(monkeypatch):
    steady = {kind.name for kind in KINDS if kind.is_run and not hasattr(kind.config(), "rollout")}
    assert steady - {"classify", "distill"} == {kind.name for kind in KINDS if kind.is_steady}  # see decisions.md
    assert {kind.name for kind in KINDS if kind.is_steady} | {"demo"} == set(STEADY)
    started = []
    monkeypatch.setattr(os, "execv", lambda *_: started.append(os.environ["GLIBC_TUNABLES"]))
    monkeypatch.setattr(huge_pages, "_is_possible", lambda: True)
    monkeypatch.delenv("MINIMIND_HUGE_PAGES", raising=False)
    for keep in (True, False, None):
        monkeypatch.setenv("GLIBC_TUNABLES", "")
        huge_pages.use_huge_pages.__wrapped__(keep)
    assert started == [OURS, "glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"]


def test_nothing_happens_without_a_new_glibc(monkeypatch):
    for version in ("glibc 2.25", "musl 1.2", None):
        monkeypatch.setattr(os, "confstr", lambda _, version=version: version)
        assert not huge_pages._is_possible()


FAULTS = """
import resource, threading
from minimind_jax.huge_pages import use_huge_pages
use_huge_pages(keep=True)
import numpy as np

def step():
    np.full(2**26, 1.0)

def in_a_thread():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

in_a_thread()
print(in_a_thread())
"""


@pytest.mark.skipif(not huge_pages._is_possible(), reason="no glibc that reads GLIBC_TUNABLES")
def test_memory_is_taken_from_the_system_once():
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MINIMIND_HUGE_PAGES")}
    for name, bounds in (("1", range(0, 100)), ("0", range(200, 10**6))):
        out = subprocess.run(
            [sys.executable, "-c", FAULTS], env={**env, "MINIMIND_HUGE_PAGES": name}, check=True, stdout=subprocess.PIPE
        )
        assert int(out.stdout) in bounds


BY_STAGE = (
    FAULTS.replace("(keep=True)", "(keep=None)").replace("use_huge_pages", "kept, use_huge_pages", 1)
    + """
def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

before = held()
with kept(True):
    in_a_thread()
    print(in_a_thread(), held() - before)
print(held() - before)
with kept(False):
    in_a_thread()
    print(in_a_thread(), held() - before)
"""
)


@pytest.mark.skipif(not huge_pages._is_possible(), reason="no glibc that reads GLIBC_TUNABLES")
def test_a_pipeline_keeps_memory_by_stage():
    """What a step needs, 512 MiB, is kept within a stage that keeps it, and given back behind it."""
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MINIMIND_HUGE_PAGES")}

    def run(**more):
        command = [sys.executable, "-c", BY_STAGE]
        out = subprocess.run(command, env={**env, **more}, check=True, stdout=subprocess.PIPE).stdout
        return list(map(int, out.split()))

    taken, faults, kept, behind, faults_later, kept_later = run()
    assert taken >= 200 and faults < 100 and kept > 500_000
    assert behind < 50_000 and faults_later >= 200 and kept_later < 50_000
    for own in ({"MINIMIND_HUGE_PAGES": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}):
        assert run(**own)[1] >= 200


GIVEN_BACK = """
from minimind_jax.huge_pages import give_back, use_huge_pages
use_huge_pages(keep=True)
import numpy as np

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

large, behind = np.full(2**25, 1.0), np.full(2**18, 1.0)
del large
before = held()
give_back()
print(before - held())
"""


@pytest.mark.skipif(not huge_pages._is_possible(), reason="no glibc that reads GLIBC_TUNABLES")
def test_memory_below_what_is_in_use_is_given_back():
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MINIMIND_HUGE_PAGES")}
    out = subprocess.run([sys.executable, "-c", GIVEN_BACK], env=env, check=True, stdout=subprocess.PIPE).stdout
    assert int(out) > 200_000  # of 262,144 kB


PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("left", "limit", "used", "of_files", "short"),
    [
        (4097, "max", 9000, 0, False),
        (4095, "max", 9000, 0, True),
        (9000, "8192", 4097, 0, True),
        (9000, "8192", 4097, 2, False),
        (9000, None, 0, 0, False),
    ],
)
def test_memory_is_short_where_less_is_left_than_the_process_holds(tmp_path, left, limit, used, of_files, short):
    """4,096 kB: of a machine, and of a container with a limit, whose pages of files are no loss."""
    group = tmp_path / "sys/fs/cgroup/user.slice/a b"
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text(f"90000 {4096 * 1024 // PAGE + 100} 100 1 0 500 0\n")
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/user.slice/a b\n")
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 16384 kB\nMemAvailable: {left} kB\nHugePages_Total: 0\n")
    if limit:
        (group / "memory.max").write_text(limit if limit == "max" else str(int(limit) * 1024))
        (group / "memory.current").write_text(str(used * 1024))
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {of_files * 1024}\n")
    assert huge_pages.is_short(tmp_path) == short


def test_nothing_is_short_where_nothing_is_told(tmp_path):
    assert not huge_pages.is_short(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_tells(monkeypatch):
    assert not huge_pages.is_short()
    monkeypatch.setattr(os, "sysconf", lambda _: 2**40)
    assert huge_pages.is_short()
