"""What a user types or pastes, message by message."""

import codecs
import contextlib
import io
import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator

PASTE_SECONDS = 0.05  # what is pasted arrives faster than anybody types; over a slow line in pieces


def typed_messages(show: Callable[[str], None], note: Callable[[str], None]) -> Iterator[str]:
    """Messages the user types, with editing and history in a terminal; ends at Ctrl-D. A message is a line, but lines
    that are pasted together are one. Of a pipe each line is a message, and is shown.

    show: prints a line as it is. note: prints a hint. Bytes that are no text become U+FFFD.
    """
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # gives input() line editing

            if "libedit" not in (readline.__doc__ or ""):  # a terminal then says what is pasted
                readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            line = input("> " if interactive else "")
            if interactive and not line.startswith("/"):  # a command is a line by itself
                line = _with_pasted(line, show)
        except EOFError:
            show("")
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves")
            continue
        if not interactive:
            show(f"> {line}")
        yield line


def typed_path(text: str) -> str:
    """The path that was typed, pasted or dragged into the terminal: as it is, or as a shell reads it, with quotes and
    backslashes."""
    if os.path.exists(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed
        words = []
    return words[0] if len(words) == 1 else text


def _with_pasted(line: str, show: Callable[[str], None]) -> str:
    """The line with those that were pasted behind it; the last one can be typed on if the paste did not end it."""
    lines = [line]
    while waiting := _waiting():
        *whole, rest = waiting.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for pasted in whole:
            show(pasted)
        lines += whole
        if not rest:
            continue
        lines.append(rest + input(rest))
    return "\n".join(lines)


def _waiting() -> str:
    """The text that is waiting in the terminal."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            break
        text += decoder.decode(data)
    return text + decoder.decode(b"", final=True)
