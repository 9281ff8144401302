"""Signals ask a run to stop: heard at once, twice without harm, and from a terminal that is gone."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from pairs import free_port

from minimind_jax.signals import SIGNALS
from minimind_jax.training.stop import ENDED_AT_ONCE, StopRequest

# Is busy for long where Python cannot run a handler, as in a compilation.
BUSY = """
import hashlib
from minimind_jax.training.stop import StopRequest
with StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""

# One process that JAX takes for several, whose preemption service hears of the signal.
NOTICED = """
import os, signal, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 1, 0)
jax.process_count = lambda: 2
from minimind_jax.training.stop import Notice
notice = Notice()
assert not notice()
os.kill(os.getpid(), signal.SIGTERM)
deadline = time.monotonic() + 60
while not notice() and time.monotonic() < deadline:
    time.sleep(0.1)
print("heard" if notice() else "not heard", flush=True)
os._exit(0)
"""

SAVES = """
import fcntl, sys, termios, time
from minimind_jax.training.stop import StopRequest
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopRequest() as stop:
    open(sys.argv[1] + ".ready", "w")
    while not stop.should_stop(1):
        time.sleep(0.01)
    for output in (sys.stdout, sys.stderr):
        print("stopped", file=output, flush=True)
    open(sys.argv[1], "w").write("saved")
    raise stop.exit()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_two_signals_ask_and_the_handlers_come_back(number, capsys):
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert not stop.should_stop(1)
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        assert stop.should_stop(2) and stop.exit().code == 128 + number
    told = capsys.readouterr().err.splitlines()
    assert [f"{number.name}: saving" in told[0], f"{number.name}: still saving" in told[1]] == [True, True]
    assert "twice more" in told[0] and "once more" in told[1] and len(told) == 2
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_to_one_of_several_processes_is_heard_where_jax_writes_it_down():
    """In a place that has no public name."""
    command = [sys.executable, "-c", NOTICED, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "heard\n", done.stderr[-2000:]


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.should_stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_is_answered_at_once_and_the_third_ends_a_busy_process():
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for words in ("saving, then stopping", "still saving", "stopped at once"):
            process.send_signal(signal.SIGINT)
            assert words in process.stderr.readline()
        assert process.wait(10) == ENDED_AT_ONCE


def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    saved = tmp_path / "saved"
    terminal, inner = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
    process = subprocess.Popen([sys.executable, "-c", SAVES, str(saved)], start_new_session=True, **streams)
    os.close(inner)
    while not saved.with_suffix(".ready").exists():
        time.sleep(0.02)
    os.close(terminal)
    assert process.wait(20) == 128 + signal.SIGHUP
    assert saved.read_text() == "saved"
