"""Command lines that are printed for a user to paste: of this program, names quoted, and installs that work."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from minimind_jax.errors import UserError


def command(*words: object, note: str = "") -> str:
    """`minimind WORDS` as it can be pasted into a plain shell: the program by its path where it is not on PATH."""
    text = " ".join([*program(), *(shlex.quote(str(word)) for word in words)])
    return f"{text}      # {note}" if note else text


def program() -> list[str]:
    """The words that start this program again: `minimind`, its path, or Python with the module."""
    beside = Path(sys.executable).parent / "minimind"
    named = Path(sys.argv[0])
    own = named if named.name == "minimind" and named.is_file() else beside
    found = shutil.which("minimind")
    if found and (not own.is_file() or os.path.realpath(found) == os.path.realpath(own)):
        return ["minimind"]
    if own.is_file():
        return [shlex.quote(_shortest(own))]
    return [shlex.quote(_shortest(Path(sys.executable))), "-m", "minimind_jax"]


def with_program(text: str) -> str:
    """A message whose commands, `minimind WORD ...`, can be pasted, too."""
    words = " ".join(program())
    return text if words == "minimind" else re.sub(r"(?<![\w/.-])minimind (?=[a-z])", lambda _: f"{words} ", text)


def install_command(extra: str) -> str:
    """What installs the packages of one of our extras, by their own names: this package need not be in any index."""
    from importlib import metadata  # here: a tenth of the time that --help takes

    pairs = [text.partition(";") for text in metadata.requires("minimind-jax") or []]
    is_of_it = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]").search
    wanted = [shlex.quote(name.strip()) for name, _, mark in pairs if is_of_it(mark)]
    return " ".join([shlex.quote(_shortest(Path(sys.executable))), "-m pip install", *wanted])


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """For imports of packages of one of our extras. Raises UserError, with what installs them, where they are missing.
    what: needs them, in words."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}: {install_command(extra)} ({error})") from error


def _shortest(path: Path) -> str:
    """Relative to the working folder for what lies in it."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
