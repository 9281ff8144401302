"""Huge pages: the program starts anew once, and only where it can help."""

import os
import subprocess
import sys

import pytest

from minimind_jax import huge_pages

PRINT = """
import os, sys
from minimind_jax.huge_pages import use_huge_pages
use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


def run(**environment):
    env = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "MINIMIND_HUGE_PAGES")}
    command = [sys.executable, "-c", PRINT, "a b", "--c"]
    return subprocess.run(command, env={**env, **environment}, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.skipif(not huge_pages._is_possible(), reason="the system does not leave huge pages to programs")
def test_the_program_starts_anew_with_its_arguments():
    assert run() == "glibc.malloc.hugetlb=1 a b --c\n"
    assert run(GLIBC_TUNABLES="glibc.malloc.arena_max=4") == "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1 a b --c\n"


def test_what_the_user_sets_stays():
    assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=2") == "glibc.malloc.hugetlb=2 a b --c\n"
    assert run(MINIMIND_HUGE_PAGES="0") == "None a b --c\n"


def test_nothing_happens_where_the_system_decides(tmp_path, monkeypatch):
    for text in ("[always] madvise never", "always madvise [never]"):
        setting = tmp_path / "enabled"
        setting.write_text(text)
        monkeypatch.setattr(huge_pages, "SETTING", setting)
        assert not huge_pages._is_possible()
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "missing")
    assert not huge_pages._is_possible()
