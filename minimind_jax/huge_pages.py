"""Huge memory pages for the large arrays of a computation on the CPU."""

import contextlib
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program anew, as the same process, with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

    XLA takes and gives back the buffers of every step, and with pages of 4 KiB the system clears and maps them each
    time: a step of the 29M model takes 15 % longer. glibc reads the setting at its start only. Nothing happens where
    Linux does not leave the choice to programs ("madvise"), without glibc 2.35 or newer, where the variable sets it
    already, or with MINIMIND_HUGE_PAGES=0.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or os.environ.get("MINIMIND_HUGE_PAGES") == "0" or not _is_possible():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller closed it
        stream.flush()
    with contextlib.suppress(OSError):  # then it runs as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_possible() -> bool:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        is_new = name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return is_new and "[madvise]" in SETTING.read_text()
    except (AttributeError, OSError, ValueError):  # no Linux, no glibc
        return False
