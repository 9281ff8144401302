"""Calls of tools that hang, take all memory, crash or say too much give short text; and the next call works."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimind_jax.errors import UserError
from minimind_jax.tools.toolbox import Toolbox

USER = str(Path(__file__).with_name("user_tools.py"))


@pytest.fixture(scope="module")
def ours():
    with Toolbox() as tools:
        yield tools


@pytest.fixture(scope="module")
def users():
    with Toolbox([USER], seconds=1.5, workers=2) as tools:
        yield tools


@pytest.fixture(scope="module")
def patient():
    with Toolbox([USER], seconds=60, memory_mib=200, workers=2) as tools:
        yield tools


def ask(tools, name, **arguments):
    """What came of a call, which another one of the same process must not have suffered from."""
    found = tools.call(name, arguments)
    assert tools.call("greet", {"name": "you"}).text == "hello you"
    return found


def test_ours_answer(ours):
    assert [schema["function"]["name"] for schema in ours.schemas] == ours.names
    assert ours.call("calculate_math", {"expression": "256*37"}) == ('{"result": "9472"}', False)
    assert json.loads(ours.call("get_current_time", {"timezone": "Asia/Shanghai"}).text)["timezone"] == "Asia/Shanghai"
    assert json.loads(ours.call("get_current_time", {}).text)["datetime"][:2] == "20"
    assert json.loads(ours.call("text_length", {"text": "你好, it's me\n"}).text) == {
        "characters": 12, "words": 4, "lines": 1,
    }  # fmt: skip
    drawn = [json.loads(ours.call("random_number", {"min": 5, "max": 9}).text)["result"] for _ in range(20)]
    assert set(drawn) <= set(range(5, 10)) and len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("value", "unit", "other", "result"),
    [
        (100, "km", "miles", 62.1371192237),
        (30, "celsius", "Fahrenheit", 86.0),
        (-40, "°F", "摄氏度", -40.0),
        (1, "公斤", "斤", 2.0),
        (5, "feet", "inches", 60.0),
        (36, "km/h", "m/s", 10.0),
        (1, "square meter", "m²", 1.0),
    ],
)
def test_units(ours, value, unit, other, result):
    found = ours.call("unit_converter", {"value": value, "from_unit": unit, "to_unit": other})
    assert json.loads(found.text)["result"] == pytest.approx(result, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nothing", {}, "there is no tool 'nothing'; there are calculate_math"),
        (None, {}, "there is no tool None"),
        (["x"], {}, "there is no tool"),
        ("calculate_math", None, "must be of type object"),
        ("calculate_math", {"expression": "__import__('os')"}, "'__import__' is not known"),
        ("calculate_math", {"expression": "9**9**9"}, "too large"),
        ("calculate_math", {"expression": {1, 2}}, "no JSON object"),
        ("calculate_math", {"expression": "1" * 100_000}, "longer than 50,000 bytes"),
        ("get_current_time", {"timezone": "../../etc/passwd"}, "unknown time zone"),
        ("get_current_time", {"timezone": "\ud800"}, "unknown time zone"),
        ("random_number", {"min": 5, "max": 1}, "min 5 is above max 1"),
        ("unit_converter", {"value": 1, "from_unit": "km", "to_unit": "kg"}, "a unit of length and kg of mass"),
        ("unit_converter", {"value": 1, "from_unit": "parsec", "to_unit": "km"}, "unknown unit 'parsec'"),
        ("unit_converter", {"value": 1e308, "from_unit": "km", "to_unit": "mm"}, "too large"),
        ("unit_converter", {"value": float("nan"), "from_unit": "km", "to_unit": "mm"}, "no finite number"),
    ],
)
def test_what_is_wrong_is_told_in_short_words(ours, name, arguments, words):
    found = ours.call(name, arguments)
    assert found.is_error and words in json.loads(found.text)["error"] and len(found.text) < 350


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize("arguments", [DEEP, {"text": DEEP}, {1: 2}, {"text": b"x"}, {"text": 10**5000}])
def test_arguments_that_are_hardly_json(ours, arguments):
    assert ours.call("text_length", arguments).is_error


ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.characters(categories=("Cs",))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=10,
)
NAMES = st.sampled_from(["expression", "value", "from_unit", "to_unit", "text", "min", "max", "timezone"])
TOOL = st.sampled_from(
    ["calculate_math", "get_current_time", "unit_converter", "random_number", "text_length", "x", ""]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TOOL, arguments=st.one_of(ANY, st.dictionaries(NAMES, ANY, max_size=3)))
def test_any_call_is_answered_in_text(ours, name, arguments):
    started = time.monotonic()
    found = ours.call(name, arguments)
    assert isinstance(found.text, str) and len(found.text) < 2200
    found.text.encode()
    if found.is_error:
        assert json.loads(found.text).keys() == {"error"}
    assert time.monotonic() - started < 8


def test_a_call_that_hangs_is_ended(users):
    for name in ("hang", "sleep"):
        started = time.monotonic()
        found = ask(users, name, **({"seconds": 600} if name == "sleep" else {}))
        assert found.is_error and f"{name} took longer than 1.5 seconds" in found.text
        assert time.monotonic() - started < 20  # the next worker has started, too


def test_a_call_that_takes_all_memory_is_ended(patient):
    assert "hog took more than 200 MiB of memory" in ask(patient, "hog").text


def test_a_worker_that_keeps_memory_is_replaced(patient):
    for _ in range(8):
        assert ask(patient, "keep", mib=60).text == "kept"


def test_results_are_cut(users):
    found = ask(users, "long")
    assert not found.is_error
    assert found.text == ("long " * 500)[:2048] + "... (cut: 10,000,000 characters)"


def test_odd_results_are_whole_text(users):
    found = ask(users, "odd")
    assert found.text.encode() and '"none": NaN' in found.text and "{1}" in found.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leave", "SystemExit: 3"),
        ("crash", "crash ended its own process"),
        ("fault", "fault ended its own process"),
        ("ask", "EOFError"),
    ],
)
def test_calls_that_end_their_process_fail_alone(users, name, words):
    found = ask(users, name)
    assert found.is_error and words in found.text


def test_errors_of_a_function_are_told_and_cut(users):
    assert ask(users, "fail", words="not there").text == json.dumps({"error": "KeyError: 'not there'"})
    assert len(ask(users, "fail", words="x" * 10_000).text) < 350


def test_what_a_tool_prints_is_no_answer_and_is_seen(capfd):
    with Toolbox([USER]) as tools:
        assert ask(tools, "speak").text == "said"
    told = capfd.readouterr()
    assert not told.out and "said aloud" in told.err and "and below" in told.err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its process by os.fork")
def test_what_a_tool_has_started_ends_with_it(users, tmp_path):
    assert "took longer" in ask(users, "spawn", file=str(tmp_path / "pid")).text
    wait_for_the_end_of([int((tmp_path / "pid").read_text())])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_of_a_tool_that_goes_on_twice_one_answers_and_the_other_ends(users, tmp_path):
    assert ask(users, "fork", file=str(tmp_path / "pid")).text == "one"
    wait_for_the_end_of([int((tmp_path / "pid").read_text())])


def test_a_seed_decides_what_is_drawn(users):
    one, two, other = (users.call("draw", {}, seed=seed).text for seed in (1, 1, 2))
    assert one == two != other


def test_many_calls_run_at_the_same_time_and_keep_their_order(users, patient, tmp_path):
    one, two = ({"own": str(tmp_path / a), "other": str(tmp_path / b)} for a, b in ("xy", "yx"))
    found = patient.call_all([("meet", one), ("nothing", {}), ("meet", two)])
    assert [(result.text, result.is_error) for result in found[::2]] == [("met", False)] * 2 and found[1].is_error
    texts = users.call_all([("greet", {"name": str(n)}) for n in range(100)])
    assert [result.text for result in texts] == [f"hello {n}" for n in range(100)]
    assert users.call_all([("draw", {})] * 2, [5, 5])[0] == users.call("draw", {}, seed=5)


def test_hundreds_of_calls_a_second(ours):
    ours.call("calculate_math", {"expression": "1"})
    started = time.process_time()
    for n in range(200):
        assert ours.call("calculate_math", {"expression": f"{n}+1"}).text == f'{{"result": "{n + 1}"}}'
    assert time.process_time() - started < 1  # of this process; the rest is the machine's load


def test_names_of_tools(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WORD = 'near'")
    (tmp_path / "mine.py").write_text(
        "from neighbour import WORD\ndef f(x: str) -> str:\n    'F.'\n    return WORD + x\ndef g() -> str:\n    'G.'\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, names in {"mine:f": ["f"], "mine.py:f": ["f"], str(tmp_path / "mine.py"): ["f", "g"]}.items():
        with Toolbox([name, "calculator", "text_length"]) as tools:
            assert tools.names == [*names, "calculate_math", "text_length"]
            assert tools.call("f", {"x": "!"}).text == "near!"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["abacus"], "there is no tool abacus; there are calculator, time"),
        (["no_such_module:f"], "tools of no_such_module cannot be imported: ModuleNotFoundError"),
        (["missing.py"], r"tools of missing\.py cannot be imported: FileNotFoundError"),
        ([f"{USER}:nothing"], "has no function nothing; it has greet, sleep"),
        ([f"{USER}:_hidden", "json:loads"], "the tool loads, parameter s has no type hint"),
        (["calculator", "{tmp}/twin.py"], "two tools are named calculate_math"),
    ],
)
def test_tools_that_are_not_there_are_named(names, words, tmp_path):
    (tmp_path / "twin.py").write_text("def calculate_math(x: str) -> str:\n    return x\n")
    with pytest.raises(UserError, match=words):
        Toolbox([name.format(tmp=tmp_path) for name in names])


def test_no_process_outlives_the_program_that_is_killed():
    script = f"""
import os, threading
from minimind_jax.tools.toolbox import Toolbox
tools = Toolbox([{USER!r}], seconds=1, workers=2)
tools.call("greet", {{"name": "x"}})
threading.Thread(target=tools.call, args=("hang", {{}})).start()
import psutil, time
time.sleep(0.3)
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()
    wait_for_the_end_of([int(pid) for pid in done.stdout.split()])


def wait_for_the_end_of(pids, seconds=20):
    until = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < until, "a process goes on although nobody waits for it"
        time.sleep(0.1)
