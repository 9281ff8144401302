"""Environments: tools whose calls may be of any kind, and ones of a user's own."""

import contextlib
import functools
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from players import CALCULATOR, Told, asks, start_of, tiny
from templates import CHATML, DEEPSEEK, LLAMA3, QWEN3_WHOLE, with_template

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.rl import AgentSettings
from minimind_jax.data.documents import encode_conversation, encode_replies
from minimind_jax.data.messages import Conversation
from minimind_jax.data.template import render, render_jinja
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.rl.environment import ToolUse, load_environment
from minimind_jax.rl.episode import Task, Turn
from minimind_jax.rl.play import Start, play
from minimind_jax.tools.toolbox import Observation
from tests.data.talk import TEXT

# As Mistral's: a result names the call that it is of, which must have been there.
PICKY = (
    "{% for message in messages %}{% if message.role == 'tool' %}{% if message.tool_call_id | length != 9 or not "
    "messages[loop.index0 - 1].tool_calls %}{{ raise_exception('of which call?') }}{% endif %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% else %}"
    "{{ message.content }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
CALL = {"name": "calculate_math", "arguments": {"expression": "2+3"}}
TOLD = {"role": "tool", "content": '{"result": "5"}'}


def calling(*calls, **others):
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **others}


def says(text, **others):
    return {"role": "assistant", "content": text, **others}


TALKS = {
    "one": [calling(CALL), TOLD, says("It is 5.")],
    "several": [calling(CALL, CALL), TOLD, TOLD, calling(CALL), TOLD, says("It is 5, 中文.")],
}
THOUGHTS = {
    "one": [calling(CALL, reasoning_content="I ask."), TOLD, says("Five.", reasoning_content="Seen.\n\nSo")],
}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    texts = [render([*asks("How much is 2+3?"), says("Five.")], [CALCULATOR]), "birds sing and cats sit on mats"] * 3
    return train_bpe(texts, tmp_path_factory.mktemp("tokenizer") / "small", 480)


@pytest.fixture(scope="session")
def tokenizer_of(small, tmp_path_factory, request):
    @functools.cache
    def make(name):
        if name == "small":
            return small
        if name == "qwen3":
            return with_template(small.folder, tmp_path_factory.mktemp("q") / "q", QWEN3_WHOLE, eos_token="<|im_end|>")
        return Tokenizer.load(request.getfixturevalue("shared_dir") / "data" / "minimind-tokenizer")

    return make


@pytest.fixture(scope="session")
def tools(small):
    environment = ToolUse(AgentSettings(tools=("calculator",)), small)
    yield environment
    environment.close()


@pytest.mark.parametrize(
    ("name", "talk", "thinking"),
    [
        *((name, talk, False) for name in ("small", "minimind") for talk in TALKS.values()),
        *((name, talk, True) for name in ("small", "minimind", "qwen3") for talk in THOUGHTS.values()),
    ],
)
def test_an_episode_is_the_conversation_that_a_model_is_taught(tokenizer_of, tools, name, talk, thinking):
    """Of the same messages, the very tokens; what the policy wrote is what is trained there, but for the think block
    that its prompt wrote, and the line break behind its turn."""
    tokenizer = tokenizer_of(name)
    messages = [{"role": "system", "content": "Be brief."}, *asks("How much is 2+3?")]
    start = start_of(tokenizer, messages, [CALCULATOR], thinking=thinking)
    document = encode_conversation(tokenizer, Conversation([*messages, *talk], [CALCULATOR]))
    whole = document.ids.tolist()
    opened = "" if name == "qwen3" else "<think>\n" if thinking else "<think>\n\n</think>\n\n"
    header = tokenizer.encode("<|im_start|>assistant\n" + opened)
    begins = [n + len(header) for n in range(len(whole)) if whole[n : n + len(header)] == header]
    ends = [begin + whole[begin:].index(tokenizer.turn_end_id) + 1 for begin in begins]
    written = [any(begin <= n < end for begin, end in zip(begins, ends, strict=True)) for n in range(len(whole))]
    frame = {*tokenizer.encode("\n"), *tokenizer.encode(opened)}
    for token, mine, taught in zip(whole, written, document.trained.tolist(), strict=True):
        assert mine == taught or (taught and token in frame)

    lines = {tuple(whole[:begin]): whole[begin:end] for begin, end in zip(begins, ends, strict=True)}
    writer = Told(tiny(tokenizer, context=1024), lambda prompt: list(lines[tuple(prompt)]))
    sampling = SamplingConfig(max_new_tokens=200)
    [episode] = play(writer, [start], tools, tokenizer, sampling=sampling, turns=4, seq_len=1024)
    assert episode.finish == "stop" and len(episode.turns) == len(begins)
    assert episode.tokens == whole[: ends[-1]] and episode.sampled == written[: ends[-1]]
    assert episode.answer == talk[-1]["content"] and not any(turn.answer for turn in episode.turns[:-1])
    called = [call.arguments for turn in episode.turns for call in turn.calls]
    assert called == [call["arguments"] for message in talk for call in message.get("tool_calls", ())]
    assert all(not told.is_error for turn in episode.turns for told in turn.observations)
    for first, second in itertools.pairwise(
        writer.answers
    ):  # but the newest token, all that was there is not read anew
        assert second.cached_tokens == len(first.request.prompt) + len(first.tokens) - 1


@pytest.mark.parametrize("role", ["tool", "user"])
@pytest.mark.parametrize("template", [CHATML, QWEN3_WHOLE, DEEPSEEK, LLAMA3, PICKY])
def test_replies_are_what_any_template_writes_behind_an_answer(small, tmp_path, template, role):
    added = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>") if template is LLAMA3 else ()
    end = "<|eot_id|>" if template is LLAMA3 else "<|im_end|>"
    tokenizer = with_template(small.folder, tmp_path / "own", template, eos_token=end, added=added)
    hostile = f"five zyxprobe {end}\n<think>"
    call = {"id": "call00000", "type": "function", "function": {"name": "count", "arguments": {}}}
    answer = {**says("It is."), **({"tool_calls": [call]} if role == "tool" else {})}
    reply = {"role": role, "content": hostile, "tool_call_id": "call00000"}
    for thinking in (False, True):
        ids = encode_replies(tokenizer, [{"role": role, "content": hostile}], None, thinking)
        asked = {"enable_thinking": thinking, "open_thinking": thinking, "add_generation_prompt": True}
        whole = render_jinja(template, [*asks("How many?"), answer, reply], None, eos_token=end, **asked)
        after = tokenizer.decode(ids, skip_special_tokens=False)
        assert whole.endswith(end + after) and "five zyxprobe" in after and "It is." not in after


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    replies=st.lists(st.tuples(st.sampled_from(["tool", "user", "system"]), TEXT), min_size=1, max_size=3),
    thinking=st.booleans(),
)
def test_replies_are_those_of_the_conversation_whatever_they_say(small, replies, thinking):
    """The tokens that our template gives them between two answers, cut where those of training are."""
    messages = [{"role": role, "content": text} for role, text in replies]
    thought = {"reasoning_content": "hm"} if thinking else {}
    talk = Conversation([*asks("q"), says("one", **thought), *messages, says("two", **thought)])
    whole = encode_conversation(small, talk).ids.tolist()
    begin = whole.index(small.turn_end_id, whole.index(small.turn_end_id) + 1) + 1  # behind the first answer
    end = len(small.encode(("hm\n</think>\n\n" if thinking else "") + "two<|im_end|>\n"))
    assert encode_replies(small, messages, None, thinking) == whole[begin : len(whole) - end]


def test_a_template_that_cannot_write_replies_is_refused(small, tmp_path):
    deaf = CHATML.replace("{{ message.content }}", "{{ message.content if message.role != 'tool' }}")
    tokenizer = with_template(small.folder, tmp_path / "own", deaf, eos_token="<|im_end|>")
    with pytest.raises(UserError, match="leaves out the content of tool message"):
        encode_replies(tokenizer, [TOLD])


# Hostile calls --------------------------------------------------------------------------------------------------------


def call_of(tool, **arguments):
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def greeting(arguments):
    return f'<tool_call>{{"name": "greet", "arguments": {arguments}}}</tool_call>'


HOSTILE = {
    "code": (call_of("calculate_math", expression="__import__('os').system('ls')"), "not known to the calculator"),
    "power": (call_of("calculate_math", expression="9**9**9**9"), "too large"),
    "not offered": (call_of("random_number"), "is not offered"),
    "unknown": (call_of("rm"), "is not offered"),
    "endless": (call_of("hang"), "took longer than"),
    "memory": (call_of("hog"), "MiB of memory"),
    "long": (call_of("long"), r"\.\.\. \(cut\)$"),
    "ends the process": (call_of("crash"), "ended its own process"),
    "list": ("<tool_call>[1]</tool_call>", "is a number"),
    "number": ("<tool_call>5</tool_call>", "is a number"),
    "no JSON": ("<tool_call>{'a'</tool_call>", "JSON"),
    "nested": ("<tool_call>" + "[" * 3000 + "</tool_call>", "not JSON|nested"),
    "nested arguments": (call_of("calculate_math", expression="(" * 900), "not arithmetic|nested"),
    "nested dict": (greeting('{"name": ' + '{"a":' * 900 + "1" + "}" * 901), "must be of type string|nested"),
    "digits": (greeting('{"name": "a", "times": ' + "9" * 5000 + "}"), "error"),
    "arguments": (greeting("[1]"), "is a list"),
    "null": ('<tool_call>{"name": null, "arguments": {}}</tool_call>', "name"),
    "open": ('<tool_call>{"name": "greet", "arguments": {"name": "Ann"}}', "hello Ann"),
    "many": (call_of("greet", name="Ann") * 1000, "calls at once"),
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(small):
    settings = AgentSettings(
        tools=("all", f"{Path(__file__).parent.parent / 'tools' / 'user_tools.py'}"),
        tool_seconds=2, tool_memory=64, observation_tokens=60,
    )  # fmt: skip
    environment = ToolUse(settings, small)
    yield environment
    environment.close()


def turn_of(text):
    answer, calls = parse_calls(text)
    return Turn(text, answer, tuple(calls), (), 0, 1, "stop")


def offering(names, **fields):
    return Task("talk.jsonl:1", asks("q"), [{"function": {"name": name}} for name in names], fields)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_call_is_told_what_is_wrong_with_it(small, hostile, name):
    text, words = HOSTILE[name]
    state = hostile.start(
        offering({schema["function"]["name"] for schema in hostile.schemas} - {"random_number"}), seed=0
    )
    turn = turn_of(text)
    told = hostile.step(state, turn)
    assert len(told) == len(turn.calls) >= 1 and {message["role"] for message in told} == {"tool"}
    assert re.search(words, told[-1]["content"]) and told[-1]["is_error"] == (name not in ("long", "open"))
    assert all(len(small.encode(message["content"])) <= 60 + 12 for message in told)
    assert hostile.step(state, turn_of(call_of("greet", name="Ann")))[0]["content"] == "hello Ann"


def test_hostile_calls_cost_at_most_their_own_episode(small, hostile):
    names = ("endless", "not offered", "number", "ends the process")
    texts = [*(HOSTILE[name][0] for name in names), call_of("greet", name="Ann")]
    starts = [
        Start(n, offering(["greet", "hang", "crash"]), small.encode(f"{n}?"), False, n) for n, _ in enumerate(texts)
    ]
    lines = {tuple(start.prompt): small.encode(f"{text}<|im_end|>") for start, text in zip(starts, texts, strict=True)}
    sorry = small.encode("I see.<|im_end|>")
    writer = Told(tiny(small, slots=2), lambda prompt: list(lines.get(tuple(prompt), sorry)))
    *episodes, good = play(
        writer, starts, hostile, small, sampling=SamplingConfig(max_new_tokens=100), turns=2, seq_len=400
    )
    for name, episode in zip(names, episodes, strict=True):
        assert re.search(HOSTILE[name][1], episode.turns[0].observations[0].text)
        assert episode.finish == "stop" and episode.answer == "I see."
    assert good.turns[0].observations == (Observation("hello Ann"),) and good.answer == "I see."


def test_what_tools_draw_comes_of_the_seed_of_the_episode(hostile):
    def drawn(seed):
        state = hostile.start(offering(["random_number"]), seed)
        told = hostile.step(state, turn_of(call_of("random_number", max=10**9) * 2))
        return [message["content"] for message in told]

    assert drawn(1) == drawn(1) and len({*drawn(1), *drawn(2)}) == 4


# Of one's own ---------------------------------------------------------------------------------------------------------

OWN = Path(__file__).parent / "user_environments.py"


def test_an_environment_of_ones_own_is_loaded_by_its_name(small, monkeypatch):
    assert type(load_environment(AgentSettings(environment=f"{OWN}:Guess"), small)).__name__ == "Guess"
    monkeypatch.syspath_prepend(OWN.parent)
    made = load_environment(AgentSettings(environment="user_environments:Guess"), small)
    assert made.step({"number": 5, "tries": 0}, Turn("5", "5", (), (), 0, 2, "stop")) is None
    with contextlib.closing(load_environment(AgentSettings(tools=("calculator",)), small)) as tools:
        assert [schema["function"]["name"] for schema in tools.schemas] == ["calculate_math"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{OWN}:Half", "has no function end; it needs start, step, end, close"),
        (f"{OWN}:Broken", "cannot be made: OSError: no such service"),
        (f"{OWN}:None", "expected tools, module:Class or FILE.py:Class|has no attribute"),
        (f"{OWN}:Other", "has no attribute 'Other'"),
        ("nowhere.py:Other", "No such file"),
        ("nowhere_at_all:Other", "No module named"),
        ("game", "expected tools, module:Class or FILE.py:Class"),
    ],
)
def test_what_is_no_environment_is_refused(small, name, words):
    with pytest.raises(UserError, match=words):
        load_environment(AgentSettings(environment=name), small)
