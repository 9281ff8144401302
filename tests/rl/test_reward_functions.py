"""What each reward function says of an episode, and of what a policy may write to deceive it."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.rl import reward_functions as functions
from minimind_jax.tools.toolbox import Observation
from tests.rl.episodes import episode

GOT = (Observation("6"),)
FAILED = (Observation('{"error": "no"}', True),)
OFFERED = [{"type": "function", "function": {"name": "calculate", "parameters": {}}}]
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "2*3"}}</tool_call>'
OTHER = CALL.replace("calculate", "search")
BROKEN = "<tool_call>[1]</tool_call>"


@pytest.mark.parametrize(
    "fields",
    [
        {"answer": "5"},
        {"gt": ["5"]},
        {"ground_truth": 5},
        {"reward_model": {"style": "rule", "ground_truth": "5"}},
        {"solution": r"so \boxed{5}"},
        {"expected_answer": "5", "solution": "other words"},
        {"label": 5},
        {"answer": "2+3 = 5\n#### 5", "solution": "other words"},
        {"answer": None, "gt": [], "ground_truth": "5"},
    ],
)
def test_the_answer_is_checked_against_what_the_record_says(fields):
    assert functions.answer(episode("It is 5.", **fields)) == 1
    assert functions.answer(episode("It is 55.", **fields)) == 0
    assert functions.answer(episode("5", "", **fields)) == functions.answer(episode(**fields)) == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {},
            "none of the fields answer, gt, ground_truth, reward_model.ground_truth, expected_answer, label, ",
        ),
        ({"answer": True}, "answer is a boolean"),
        ({"gt": [["5"]]}, "gt is a list"),
        ({"answer": {"a": 1}}, "answer is an object"),
        ({"answer": ["Paris", "London"]}, "one text, or numbers"),
        ({"reward_model": "5"}, "none of the fields"),
    ],
)
def test_a_record_that_says_nothing_to_check_is_told(fields, words):
    for function in (functions.answer, functions.tools):
        with pytest.raises(ValueError, match=words) as error:
            function(episode("5", **fields))
        assert type(error.value) is ValueError


def test_numbers_of_the_question_may_be_said_beside_several_that_are_due():
    asked = {"question": "1+1, 2+2, 3+3", "gt": ["2", "4", "6"]}
    assert functions.answer(episode("1+1 is 2, 2+2 is 4, 3+3 is 6", **asked)) == 1
    assert functions.answer(episode(" ".join(map(str, range(100))), **asked)) == 0


# Form -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "value"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 0)])
def test_length_is_of_tokens(count, value):
    assert functions.length(episode("long text", tokens=[7] * count), 2, 5) == value
    assert functions.length(episode("x" * count, "yy"), 4, 7) == value


def test_lengths_and_repetition_are_trls():
    rewards = pytest.importorskip("trl.rewards")
    ids = [[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1, 2, 7], [3] * 16, [1], [], list(range(12)), list(range(15)) * 2]
    for n in (1, 2, 3):
        theirs = rewards.get_repetition_penalty_reward(n)(ids)
        assert [functions.repetition(episode("x", tokens=each), n) for each in ids] == pytest.approx(theirs, abs=1e-12)
    for cache in (1, 5, 16):
        theirs = rewards.get_soft_overlong_punishment(16, cache)(ids)
        ours = [functions.overlong(episode("x", tokens=each), cache, max_new_tokens=16) for each in ids]
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_repetition_is_seen_in_any_script_and_within_a_turn():
    assert functions.repetition(episode("你好你好你好你好")) == pytest.approx(2 / 6 - 1)
    assert functions.minimind(episode("你好你好你好你好")) == -0.5  # MiniMind sees one word
    assert functions.repetition(episode("abc", "abc")) == functions.repetition(episode("ab")) == 0
    assert functions.repetition(episode()) == 0


@pytest.mark.parametrize(("count", "value"), [(12, 0), (13, -0.25), (15, -0.75), (16, -1), (40, -1)])
def test_overlong_is_of_the_longest_turn(count, value):
    assert functions.overlong(episode("ab", "x" * count, "abc"), 4, max_new_tokens=16) == value
    assert functions.overlong(episode(), 4, max_new_tokens=16) == 0
    for cache in (0, 17):
        with pytest.raises(UserError, match=r"at most rollout.max_new_tokens, 16$"):
            functions.overlong(episode(), cache, max_new_tokens=16)


@pytest.mark.parametrize(
    ("texts", "opened", "value"),
    [
        (["so\n</think>\n\n5"], True, 1),
        (["so</think>" + CALL, "then</think>5"], True, 1),
        (["so</think>" + CALL, "5"], True, 0),
        (["never closed 5"], True, 0),
        (["</think>5"], True, 0),
        (["so</think> "], True, 0),
        (["so</think>5</think>6"], True, 0),
        (["<think>so</think>5"], True, 0),
        (["5"], False, 1),
        (["</think>5"], False, 0),
        (["<think>so</think>5"], False, 0),
        ([""], False, 0),
        ([], True, 0),
    ],
)
def test_thinking(texts, opened, value):
    assert functions.thinking(episode(*texts, thinking=opened)) == value


@pytest.mark.parametrize(
    ("text", "asked", "opened", "value"),
    [
        ("\n<think>\nso\n</think>\n\n5", True, False, 1),  # with Qwen3's own template
        ("<think>so", True, False, 0),
        ("so</think>5", True, False, 0),
        ("<think></think>5", True, False, 0),
        ("<think>so</think><think>5", True, False, 0),
        ("5", True, False, 0),
        ("so</think>5", False, True, 1),  # with a template that always opens a block
        ("5", False, True, 0),
    ],
)
def test_thinking_is_opened_by_prompt_or_policy(text, asked, opened, value):
    assert functions.thinking(episode(text, thinking=asked, opened=opened)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', 1),
        (" [1, 2]\n", 1),
        ("5", 0),
        ('{"a": 1} and more', 0),
        ('{"a": NaN}', 0),
        ("{'a': 1}", 0),
        ("[" * 100_000, 0),
        ("1" * 100_000, 0),
        ("", 0),
    ],
)
def test_json(text, value):
    assert functions.json_form(episode(text)) == value


def test_what_an_environment_keeps():
    class Kept:
        def __init__(self):
            self.score = 0.5

    one = episode("x")
    for one.state in (Kept(), {"score": 0.5}):
        assert functions.state(one, "score") == 0.5
        with pytest.raises(ValueError, match="has no 'points'"):
            functions.state(one, "points")
    with pytest.raises(ValueError, match="NoneType"):
        functions.state(episode("x"), "score")


def test_json_of_a_schema(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "form.json"
    file.write_text(json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}))
    found = [functions.json_form(episode(text), str(file)) for text in ('{"a": 1}', '{"a": "1"}', "{}", "[1]", "a")]
    assert found == [1, 0, 0, 0, 0]
    for n, (text, words) in enumerate([("[]", "expected a JSON object"), ('{"type": "thing"}', "not a JSON schema")]):
        (tmp_path / f"{n}.json").write_text(text)
        with pytest.raises(UserError, match=words):
            functions.json_form(episode("{}"), str(tmp_path / f"{n}.json"))
    with pytest.raises(UserError, match=r"cannot be read: .*; put the JSON schema there"):
        functions.json_form(episode("{}"), str(tmp_path / "absent.json"))


# What MiniMind's own calculate_rewards (train_grpo.py) gives, without its reward model.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("short", -0.5),
        ("x" * 20, 0.5),
        ("x" * 801, -0.5),
        ("  padded text of 22 chars  ", 0.5),
        ("thoughts of twenty chars</think>the answer", 1.75),
        ("brief</think>the answer is five and that is all", 0.25),
        ("thoughts of twenty chars</think>one</think>two", 1.25),
        ("to be or not to be or not to be", 0.0),
        ("No no no no no no no no no no no", 0.0),
        ("你好你好你好你好", -0.5),
        ("think it over and over again</think>你好，你好，你好，你好，你", 1.25),
    ],
)
def test_minimind(text, value):
    assert functions.minimind(episode(text)) == pytest.approx(value, abs=1e-12)


# Tools ----------------------------------------------------------------------------------------------------------------


def agent(*texts, told=(), finish="stop", tools=OFFERED, gt=("6",), **fields):
    calls = [parse_calls(text)[1] for text in texts]
    found = episode(*texts, calls=calls, observations=told, tools=tools, gt=list(gt), **fields)
    found.finish = finish
    return functions.tools(found)


@pytest.mark.parametrize(
    ("texts", "told", "value"),
    [
        ([CALL, "It is 6."], [GOT], 1.5),
        ([CALL, "It is 36."], [GOT], 0),
        (["It is 6."], [], -0.5),
        (["It is 36."], [], -0.5),
        ([], [], -0.5),
        ([CALL, CALL, "6"], [FAILED, GOT], 1.25),
        ([CALL, "6"], [FAILED], -0.5),
        ([OTHER, "6"], [FAILED], -0.5),
        ([BROKEN, "6"], [FAILED], -0.5),
        ([CALL + BROKEN, "6"], [GOT + FAILED], 1.25),
        ([CALL, "7"], [FAILED], -0.5),
        ([CALL, CALL], [GOT], -0.25),
        ([CALL, "6"], [GOT * 3, GOT], 1.5),
    ],
)
def test_tools(texts, told, value):
    assert agent(*texts, told=told) == value


def test_tools_where_the_episode_is_cut_off_or_offers_none():
    for finish in ("length", "turns", "tokens", "seconds", "error"):
        assert agent(CALL, "6", told=[GOT], finish=finish) == 0
    assert agent("6", tools=None) == 1.5 and agent("7", tools=None) == 0


def test_tools_where_the_truth_is_calls():
    due = ['{"name": "calculate", "arguments": {"expression": "2*3"}}']
    assert agent(CALL, "done", told=[FAILED], gt=due) == 1.5  # these tools exist for no one here
    assert agent(CALL.replace("2*3", " 2*3 "), told=[FAILED], gt=due, finish="turns") == 1.5
    assert agent(CALL, CALL, told=[FAILED], gt=due) == 1.5
    assert agent(CALL.replace("2*3", "2*4"), gt=due) == 0
    assert agent(CALL, CALL.replace("2*3", "2*4"), gt=due) == 0
    assert agent(CALL, OTHER, gt=due) == -0.25
    assert agent("6", gt=due) == agent(BROKEN, gt=due) == -0.5
    with pytest.raises(ValueError, match="what is due"):
        agent(CALL, gt=["{nonsense"])


@pytest.mark.parametrize("name", ["gsm8k", "cmath_zh", "math_minimind_sample", "math_synthetic", "bfcl"])
def test_the_truths_of_real_records_are_right_and_others_are_not(name, shared_dir):
    with (shared_dir / "data" / f"agent_rl_{name}.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in itertools.islice(file, 100)]
    for record in records:
        system, user, *_ = record["conversations"]
        schemas, gt = json.loads(system["tools"]), record["gt"]
        first = {"name": (schemas[0].get("function") or schemas[0])["name"], "arguments": {"x": 2}}
        due = gt if gt[0].startswith("{") else [json.dumps(first)]
        calls = "".join(f"<tool_call>{call}</tool_call>" for call in due)
        settings = {"told": [GOT * len(due)], "tools": schemas, "gt": gt, "question": user["content"]}
        assert agent(calls, f"It is {', '.join(gt)}.", **settings) == 1.5
        worse = [
            calls.replace('"arguments": {', '"arguments": {"more": 1, ', 1),
            "It is " + ", ".join("7" + t for t in gt),
        ]
        assert agent(*worse, **settings) == 0


ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([CALL, OTHER, BROKEN, "</think>", "<think>", "6", "####", "{", '"a"']), max_size=6).map(
        "".join
    ),
)


@given(st.lists(ANY_TEXT, max_size=3), st.booleans())
def test_whatever_is_written_has_a_value_within_bounds(texts, opened):
    calls = [parse_calls(text)[1] for text in texts]
    told = [tuple(Observation("x", bool(call.error)) for call in each) for each in calls]
    one = episode(*texts, thinking=opened, calls=calls, observations=told, tools=OFFERED, gt=["6"])
    assert functions.answer(one) in (0, 1) and functions.thinking(one) in (0, 1) and functions.json_form(one) in (0, 1)
    assert -0.5 <= functions.tools(one) <= 0 or 1 <= functions.tools(one) <= 1.5
    assert (functions.tools(one) >= 1) <= (functions.answer(one) == 1)
    assert -1 <= functions.repetition(one) <= 0 and -1 <= functions.overlong(one, 4, max_new_tokens=16) <= 0
    assert -1.75 <= functions.minimind(one) <= 1.75
