"""Memory for the large arrays of a computation on the CPU: in huge pages, and kept."""

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# glibc's malloc. Huge pages where Linux leaves the choice to programs ("madvise"); since 2.35.
TUNABLES = {"glibc.malloc.hugetlb": 1}
# Threads that share one heap, of which nothing is given back, get the pages that they had before.
ONE_HEAP = {"glibc.malloc.arena_max": 1}
KEEPING = {"glibc.malloc.mmap_max": 0, "glibc.malloc.trim_threshold": 2**40, **ONE_HEAP}
# mallopt's numbers, with what `KEEPING` says, and what glibc comes to by itself where large arrays are taken and freed.
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_GIVEN_BACK = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26))

_may_be_kept = False  # this program was started with ONE_HEAP


@functools.cache  # or a second call would start it anew once more
def use_huge_pages(keep: bool | None) -> None:
    """Starts this program anew, as the same process, with TUNABLES, and with keep KEEPING, in GLIBC_TUNABLES. keep:
    None where its stages will say (see `kept`).

    XLA takes and gives back the buffers of every step, gigabytes, and the system maps and clears them each time: a step
    of the 29M model takes 15 % longer with pages of 4 KiB, and 20 % longer where memory is not kept. glibc reads the
    settings at its start only; processes that this one starts are to give memory back, and do not have them. Nothing
    happens without glibc 2.26 or newer, to what the variable sets already, or with MINIMIND_HUGE_PAGES=0.
    """
    if os.environ.get("MINIMIND_HUGE_PAGES") == "0" or not _is_possible():
        return
    given = [each for each in os.environ.get("GLIBC_TUNABLES", "").split(":") if each]
    tunables = TUNABLES | (ONE_HEAP if keep is None else KEEPING if keep else {})
    names, ours = {each.partition("=")[0] for each in given}, [f"{name}={value}" for name, value in tunables.items()]
    missing = [each for each in ours if each.partition("=")[0] not in names]
    if not missing:
        global _may_be_kept
        _may_be_kept = keep is None and not names & KEEPING.keys() - ONE_HEAP.keys()
        os.environ["GLIBC_TUNABLES"] = ":".join(each for each in given if each not in ours)
        return
    os.environ["GLIBC_TUNABLES"] = ":".join([*given, *missing])
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller closed it
        stream.flush()
    with contextlib.suppress(OSError):  # then it runs as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def kept(keep: bool) -> Iterator[None]:
    """Memory is kept meanwhile, and all that is free is given back at the end, in a program that `use_huge_pages` left
    the choice; else nothing happens."""
    if not (keep and _may_be_kept):
        yield
        return
    library = ctypes.CDLL(None)
    for setting in _KEPT:
        library.mallopt(*setting)
    yield
    for setting in _GIVEN_BACK:
        library.mallopt(*setting)
    gc.collect()  # a run's parts know one another
    give_back()


def give_back() -> None:
    """Gives the system the memory that the heap holds free.

    After a run's first step: what was taken beside it, such as rows read ahead, lies behind the step's buffers or comes
    to lie in their place, so that the second step may take as much again; from then on its place is its own.
    """
    if _is_possible():
        ctypes.CDLL(None).malloc_trim(0)


def is_short(root: Path = Path("/")) -> bool:
    """Whether less memory is left on this machine, or of what its container may have, than this process holds.

    As small arrays come to lie where a step's buffers were, a later step takes new ones, and may hold them three times:
    up to here that costs nothing, and beyond it `give_back` is what keeps the process alive. False where it isn't told.
    """
    try:
        resident, of_files = map(int, (root / "proc/self/statm").read_text().split()[1:3])
        held = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
        told = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        left = next(int(size) * 1024 for name, size, *_ in told if name == "MemAvailable:")
    except (AttributeError, LookupError, OSError, StopIteration, ValueError):  # no Linux
        return False
    return min(left, _left_in_container(root)) < held


def _left_in_container(root: Path) -> float:
    """Bytes that the control group (version 2) may still take, with the pages of files that it would give up."""
    try:
        groups = (line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines())
        folder = root / "sys/fs/cgroup" / next(path.strip("/") for number, _, path in groups if number == "0")
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used + int(told["inactive_file"])
    except (LookupError, OSError, StopIteration, ValueError):  # no control groups, or no limit ("max")
        return float("inf")


def _is_possible() -> bool:
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 26)
    except (AttributeError, OSError, ValueError):  # no Linux, no glibc
        return False
