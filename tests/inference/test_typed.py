"""What is typed and pasted into a pseudo-terminal."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

READER = """
from minimind_jax.inference.typed import typed_messages
for message in typed_messages(print, print):
    print("MESSAGE", repr(message), flush=True)
"""


def type_into(pastes, env=()):
    """The messages that are read when these bytes are typed, each when the one before was read; then Ctrl-D.
    A tuple: a paste whose last line is typed on."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **dict(env)}
    process = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""

    def wait_for(what, count):
        nonlocal seen
        until = time.monotonic() + 60
        while seen.count(what) < count and time.monotonic() < until:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # it has ended
                return

    wait_for(b"> ", 1)
    for number, paste in enumerate(pastes, 1):
        time.sleep(0.1)  # the prompt is there before the terminal is ready
        for part in [paste] if isinstance(paste, bytes) else paste:
            os.write(ours, part)
            time.sleep(0.4)  # a person, who is slower than a paste
        wait_for(b"MESSAGE", number)
    time.sleep(0.1)
    os.write(ours, b"\x04")
    wait_for(b"never said", 1)
    process.wait(60)
    os.close(ours)
    return re.findall("MESSAGE (.*)", seen.decode().replace("\r", ""))


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_pasted_lines_are_one_message(term):
    pastes = [b"one\n", "two\nthree 你\n\nfour\n".encode(), b"/clear\n", (b"five\nsix", b" seven\n")]
    expected = ["'one'", "'two\\nthree 你\\n\\nfour'", "'/clear'", "'five\\nsix seven'"]
    assert type_into(pastes, {"TERM": term}.items()) == expected


def test_a_paste_that_the_terminal_marks_is_one_message():
    assert type_into([b"\x1b[200~one\rtwo\x1b[201~\r"]) == ["'one\\ntwo'"]


def test_lines_of_a_pipe_are_messages():
    done = subprocess.run(
        [sys.executable, "-c", READER], input="one\ntwo\n", capture_output=True, text=True, check=True
    )
    assert done.stdout == "> one\nMESSAGE 'one'\n> two\nMESSAGE 'two'\n\n"
