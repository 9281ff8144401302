"""Signals end a command: answered at once, with what was begun put in order and told."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_jax import signals
from minimind_jax.cli import main
from minimind_jax.convert.replace import replacing
from minimind_jax.inference.answer_file import AnswerFile, PartialFile
from minimind_jax.signals import SIGNALS, Stopped, answering, telling, uninterrupted

# Is busy for long where Python cannot run a handler, as in a compilation; a first Ctrl-C may have been answered before.
BUSY = """
import contextlib, hashlib, os, signal, sys, time
from minimind_jax.signals import answering, telling
with answering(0.1), telling(lambda: "half of it is there"):
    if sys.argv[1:]:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        time.sleep(0.5)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize(("number", "earlier"), [*((number, ()) for number in SIGNALS), (signal.SIGINT, ("earlier",))])
def test_a_long_call_answers_and_the_second_signal_ends_it(number, earlier):
    command = [sys.executable, "-c", BUSY, *earlier]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # the call has begun
        process.send_signal(number)
        told = process.stderr.readline()
        assert f"{number.name}: stopping when this part is done" in told and "again to stop at once" in told
        process.send_signal(number)
        assert process.stderr.readline() == "minimind: half of it is there\n"
        assert process.wait(10) == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_where_python_can_answer_it_is_an_exception_and_nothing_is_added(number, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped), answering(0.05):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert [signal.getsignal(each) for each in SIGNALS] == before and not capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_an_exception_that_is_lost_in_a_callback_comes_again(number):
    """Where JAX looks after the garbage collector, Python only prints what is raised."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped), answering():
            gc.collect()
            assert sent
            time.sleep(5)
    finally:
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_an_import_that_swallows_everything_ends_the_command_behind_it(number, tmp_path, monkeypatch):
    lines = (
        "import os, time\ntry:\n    os.kill(os.getpid(), {})\n    time.sleep(0.1)\nexcept BaseException:\n    pass\n"
    )
    (tmp_path / f"swallows_{number}.py").write_text(lines.format(int(number)))
    monkeypatch.syspath_prepend(tmp_path)
    imported = []
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Stopped), answering():
        imported.append(importlib.import_module(f"swallows_{number}"))
        time.sleep(5)
    assert imported


def test_an_exception_that_a_library_makes_another_error_of_is_itself_again():
    with pytest.raises(Stopped) as stop, answering():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Stopped as error:
            raise ValueError(f"Non-hashable static arguments: {type(error).__name__}: 143") from error
    assert stop.value.code == 143


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with answering():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_must_not_be_left_half_done_is_done_first():
    done = []
    with pytest.raises(Stopped), answering():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
        done.append(2)
    assert done == [1]


def test_the_second_hangup_of_a_closed_terminal_disturbs_nothing():
    done = []
    with pytest.raises(Stopped), answering():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            done.append("put in order")
    assert done


def stop_in(function, number=signal.SIGTERM):
    """The function, within which this process gets the signal."""

    def wrapped(*arguments, **named):
        os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return wrapped


@pytest.mark.parametrize("number", SIGNALS)
def test_a_conversion_of_data_leaves_no_half_file(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    from minimind_jax.data import convert_command

    monkeypatch.setattr(convert_command, "recognise", stop_in(convert_command.recognise, number))
    output = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(tmp_path / "in.jsonl"), str(output)]) == 128 + number
    told = capsys.readouterr().err
    assert f"{output} was not written; give the command again" in told and "stopped" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_model_that_is_being_written_leaves_the_older_one_or_none(tmp_path, capsys):
    for is_older in (False, True):
        if is_older:
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
        with pytest.raises(Stopped), answering(), replacing(tmp_path / "model") as staged:
            (staged / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert ("the older model there is unchanged" in capsys.readouterr().err) == is_older
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model"] * is_older


def test_a_model_is_moved_into_place_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", stop_in(os.replace))
    with pytest.raises(Stopped), answering(), replacing(tmp_path / "model") as staged:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (staged / name).write_text("{}")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(("make", "again"), [
    (PartialFile, "begins anew"), (lambda output: AnswerFile(output, {"seed": 1}, True), "goes on from there"),
])  # fmt: skip
def test_answers_that_are_left_are_told(make, again, tmp_path, capsys):
    output: Path = tmp_path / "out.jsonl"
    for count in (0, 1):
        with pytest.raises(Stopped), answering(), make(output) as file:
            for _ in range(count):
                file.write({"text": "a", "finish_reason": "stop"})
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        told = capsys.readouterr().err
        assert (f"what was answered is in {output}.partial; the same command {again}" in told) == bool(count)
        assert {path.suffix for path in tmp_path.iterdir()} <= ({".partial", ".settings"} if count else set())
    with make(output) as file:
        file.finish()
    assert not capsys.readouterr().err and not signals._left


def test_nothing_is_told_of_what_was_finished(capsys):
    with telling(lambda: "half"):
        pass
    with pytest.raises(ValueError), telling(lambda: "half"):
        raise ValueError
    assert not capsys.readouterr().err
