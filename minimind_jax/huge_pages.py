"""Memory for the large arrays of a computation on the CPU: in huge pages, and kept."""

import contextlib
import os
import sys

# glibc's malloc. Threads that share one heap, of which nothing is given back, get the pages that they had before.
TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # where Linux leaves the choice to programs ("madvise"); since 2.35
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**40,
    "glibc.malloc.arena_max": 1,
}


def use_huge_pages() -> None:
    """Starts this program anew, as the same process, with TUNABLES in GLIBC_TUNABLES.

    XLA takes and gives back the buffers of every step, gigabytes, and the system maps and clears them each time: a step
    of the 29M model takes 15 % longer with pages of 4 KiB, and 20 % longer where memory is not kept. glibc reads the
    settings at its start only. Nothing happens without glibc 2.26 or newer, to what the variable sets already, or with
    MINIMIND_HUGE_PAGES=0.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    missing = [f"{name}={value}" for name, value in TUNABLES.items() if name not in tunables]
    if not missing or os.environ.get("MINIMIND_HUGE_PAGES") == "0" or not _is_possible():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, *missing]))
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller closed it
        stream.flush()
    with contextlib.suppress(OSError):  # then it runs as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_possible() -> bool:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 26)
    except (AttributeError, OSError, ValueError):  # no Linux, no glibc
        return False
