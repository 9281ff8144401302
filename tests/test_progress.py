"""Signs of life: a bar or a spinner on a terminal, lines elsewhere, and which commands give them."""

import io
import time

import pytest
from rich.console import Console

from minimind_jax import progress as module
from minimind_jax.progress import first_awaited, heartbeat, progress, tracked
from minimind_jax.training.progress import TrainingProgress


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY", 0.02)


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal in place of stderr is shown."""
    shown = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda **options: Console(file=shown, force_terminal=True, width=80, height=20)
    )
    return shown


def test_lines_tell_what_is_done_and_end_with_the_work(often, capsys):
    with progress("counting", 2000) as advance:
        advance(1500)
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("counting, 1,500 of 2,000, 0:00:00 so far") for line in lines)
    time.sleep(0.06)
    assert capsys.readouterr().err == ""


def test_short_work_and_other_processes_say_nothing(often, capsys):
    assert list(tracked(range(3), "short", 3)) == [0, 1, 2]
    with progress("elsewhere", show=False) as advance:
        advance(1)
        time.sleep(0.05)
    printed = capsys.readouterr()
    assert printed.out == "" and "elsewhere" not in printed.err


def test_a_line_ends_when_the_work_fails(often, capsys):
    with pytest.raises(ZeroDivisionError), progress("failing"):
        raise ZeroDivisionError
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_leaves_stdout_alone(terminal, capsys):
    for number in tracked([5, 6], "working", 2):
        print(number)
        time.sleep(0.15)
    assert "working" in terminal.getvalue() and "1/2" in terminal.getvalue()
    assert capsys.readouterr().out == "5\n6\n"


def test_the_first_is_awaited(terminal):
    def slow():
        time.sleep(0.15)
        yield from "ab"

    assert list(first_awaited(slow(), "compiling")) == ["a", "b"]
    assert "compiling" in terminal.getvalue()
    assert list(first_awaited([], "compiling")) == []


def test_a_training_without_a_terminal_says_that_it_compiles(often, capsys):
    with TrainingProgress("sft", 10, 0) as shown:
        time.sleep(0.06)
        shown.update(1, {"loss": 1.0, "learning_rate": 0.1}, {"reward": 0.5}, log=True)
        told = capsys.readouterr()
        assert "sft: compiling, 0:00:00 so far" in told.err
        assert "sft 1/10  loss 1.0000  reward 0.500  lr 1.00e-01" in told.out
        time.sleep(0.05)
    with TrainingProgress("sft", 10, 0, active=False):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_heartbeat_needs_no_total(often, capsys):
    with heartbeat("waiting"):
        time.sleep(0.05)
    assert capsys.readouterr().err.startswith("waiting, 0:00:00 so far")
