"""Errors that no command has words of its own for: what the user can do about each, or that it is a bug."""

import errno
import os
import sys
import traceback

from minimind_jax import __version__
from minimind_jax.errors import first_line
from minimind_jax.shell import install_command

_FILE_TROUBLE = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some space there, or choose another folder",
    errno.EFBIG: "the limit on the size of files (ulimit -f) or the disk's own is too small",
    errno.EACCES: "choose a folder that you may use, or change its permissions",
    errno.EPERM: "choose a folder that you may use, or change its permissions",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
}
_LESS_MEMORY = (
    "in training make training.accumulation_steps larger (the result stays the same), training.batch_tokens or "
    "data.seq_len smaller, or set compute.remat full; elsewhere make --batch_size smaller. `minimind plan` tells what "
    "a run needs"
)


def explain(error: BaseException) -> str | None:
    """What an unexpected error means to the user, with a way out; None for one that looks like a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory ({first_line(error)[:200] or 'of this machine'}); {_LESS_MEMORY}"
    if isinstance(error, OSError) and (error.filename or error.errno in _FILE_TROUBLE):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        where = f"{' -> '.join(names)}: " if names else ""
        way_out = _FILE_TROUBLE.get(error.errno or 0, "check that name, and what is there")
        return f"{where}{error.strerror or error}; {way_out}"
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.endswith("xla_bridge.py"):  # where JAX looks for devices, maybe without a word
        return _backend(first_line(error)[:200])
    if isinstance(error, RuntimeError) and "home directory" in text:
        return "your home folder is not known; set HOME, or give paths without ~ and set MINIMIND_CACHE to a folder"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:80]!r} holds bytes that are not UTF-8, which cannot be used here; choose another name"
    return None


def _backend(told: str) -> str:
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return f"JAX cannot use this machine's devices: {told}"
    extra = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}.get(asked.split(",")[0])
    install = f", or install what it needs: {install_command(extra)}" if extra else ""
    reason = told or "no such device is found"
    return (
        f"JAX_PLATFORMS is {asked}, and JAX cannot use it here ({reason}); unset JAX_PLATFORMS to take what this "
        f"machine has, or set it to cpu{install}"
    )


def report_bug() -> None:
    """Prints the traceback of the error that is being handled, for a bug report, and what is left of the run."""
    traceback.print_exc()
    print(
        f"minimind: this is a bug in minimind_jax {__version__} and no mistake of yours; please report the lines above "
        "with the command. What a run had saved is kept in its folder: the same command goes on from there.",
        file=sys.stderr,
    )
