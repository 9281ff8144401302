"""Errors that are the user's to mend: the command line prints their message and no traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something in the user's files, settings or machine is wrong; the message says what and how to mend it."""


class TemplateFault(UserError):
    """A chat template cannot write a kind of conversation, whatever is said in it: no record's fault, never skipped."""


def first_line(error: BaseException) -> str:
    """What an error says, where only its first line is for the user."""
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def explained(what: str, *kinds: type[Exception], way_out: str = "") -> Iterator[None]:
    """Makes errors of these kinds a UserError: what is wrong, why in the error's own words, and the way out. One that
    is a UserError already stays as it is, unless that is among the kinds."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) and UserError not in kinds:
            raise
        raise UserError(f"{what}: {error}{way_out and f'; {way_out}'}") from error


@contextlib.contextmanager
def disk_errors(what: str, way_out: str) -> Iterator[None]:
    """Makes an error of the disk a UserError: what could not be done, why, and the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}; {way_out}") from error
