"""The terminal chat: history, commands, trimming, thinking, interruption, pipes."""

import dataclasses
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from templates import QWEN3, with_template

from minimind_jax.config.generation import ChatConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.template import render
from minimind_jax.data.tools import parse_calls
from minimind_jax.errors import UserError
from minimind_jax.inference import chat as chat_module
from minimind_jax.inference.chat import Clock, Dialogue, chat
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine, load_model
from minimind_jax.inference.request import Answer, Request, Token
from minimind_jax.tools.toolbox import Toolbox

CONFIG = ChatConfig(max_new_tokens=12, temperature=1.0, model="tiny", ignore_eos=True)


@pytest.fixture(scope="module")
def generator(model_folder):
    return load_engine(str(model_folder))


def talk(generator, lines, config=CONFIG):
    """What the chat prints for these lines."""
    console = Console(file=io.StringIO(), width=200, markup=False, emoji=False, highlight=False)
    chat(generator, config, console, lines)
    return console.file.getvalue()


def ask(conversation, text):
    conversation.ask(text)
    [*_, last] = conversation.answer()
    conversation.keep(last.answer.text, "")
    return last.answer


def test_answers_are_streamed_and_speed_is_shown(generator):
    conversation = Dialogue(generator, CONFIG)
    expected = ask(conversation, "The cat?").text
    printed = talk(generator, ["The cat?", "/exit", "never asked"])
    assert expected in printed
    assert "[12 tokens, " in printed and "tokens/s, first after " in printed
    assert "cut off" in printed
    assert "never asked" not in printed


def test_the_next_answer_sees_the_whole_conversation(generator):
    conversation = Dialogue(generator, CONFIG)
    first = ask(conversation, "one").text
    conversation.ask("two")
    assert conversation.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "two"},
    ]
    [*_, last] = conversation.answer()
    expected = encode_prompt(generator.tokenizer, conversation.messages, open_thinking=False)
    assert last.answer.prompt_tokens == len(expected)


@pytest.mark.parametrize("thinking", [False, True])
def test_the_prompt_tells_whether_an_answer_is_thinking(thinking, generator, tmp_path):
    tokenizer = with_template(generator.tokenizer.folder, tmp_path / "tokenizer", QWEN3)
    generator = Engine(generator.model, generator.params, tokenizer)
    conversation = Dialogue(generator, dataclasses.replace(CONFIG, thinking=thinking, system="s"))
    conversation.ask("How many?")
    assert not conversation.opens_thinking()


def test_a_question_asked_again_is_answered_anew(generator):
    conversation = Dialogue(generator, CONFIG)
    first = ask(conversation, "one").ids
    conversation.command("/clear")
    assert ask(conversation, "one").ids != first
    assert ask(Dialogue(generator, CONFIG), "one").ids == first  # and yet the seed decides


def test_commands_change_the_prompt(generator):
    conversation = Dialogue(generator, CONFIG)
    ask(conversation, "one")
    assert "forgotten" in conversation.command("/system Be brief.")
    assert conversation.messages == []
    assert "thinks" in conversation.command("/think")
    conversation.ask("two")
    [*_, last] = conversation.answer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert last.answer.prompt_tokens == len(encode_prompt(generator.tokenizer, messages, open_thinking=True))
    assert "at once" in conversation.command("/nothink")
    assert "no system prompt" in conversation.command("/system")
    assert conversation.system == ""
    assert "unknown command /hlep" in conversation.command("/hlep")
    assert "/clear" in conversation.command("/help")


def test_the_oldest_turns_are_dropped_whole_and_the_user_is_told(generator):
    """The model's context is 640 tokens; a question of about 150 tokens and its answer take a quarter of it."""
    question = "what is a cat and what is a dog? " * 5
    printed = talk(generator, [question] * 6)
    assert "of the oldest turns no longer fit" in printed
    conversation = Dialogue(generator, CONFIG)
    dropped = 0
    for _ in range(10):
        dropped += conversation.ask(question)
        conversation.keep("a cat", "")
    assert dropped > 0
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * (10 - dropped)


def test_a_message_too_long_for_the_model_is_refused_and_the_chat_goes_on(generator):
    conversation = Dialogue(generator, CONFIG)
    ask(conversation, "one")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"the message takes \d+ tokens.*context of 640"):
        conversation.ask("xyz " * 400)
    assert conversation.messages == before
    assert "the message takes" in talk(generator, ["xyz " * 400, "hi"])


def test_a_message_that_leaves_little_room_is_told_how_short_its_answer_has_to_be(generator):
    def dialogue(tokens):
        return Dialogue(generator, dataclasses.replace(CONFIG, max_new_tokens=tokens))

    with pytest.raises(UserError, match="at most 320 fit") as told:
        dialogue(600).ask("xyz " * 110)
    named = int(re.search(r"--max_new_tokens (\d+) leaves room", str(told.value))[1])
    dialogue(named).ask("xyz " * 110)
    with pytest.raises(UserError, match=f"--max_new_tokens {named} leaves room"):
        dialogue(named + 1).ask("xyz " * 110)
    with pytest.raises(UserError, match="say less"):
        dialogue(1).ask("xyz " * 400)


def test_thinking_is_dim_and_kept_as_reasoning(generator, monkeypatch):
    monkeypatch.setattr(Dialogue, "answer", lambda self: iter(pieces("let me see\n</thi", "nk>\n\nA cat", ".")))
    console = Console(file=io.StringIO(), force_terminal=True, width=200, markup=False, emoji=False, highlight=False)
    config = ChatConfig(model="tiny", thinking=True, show_speed=False)
    conversation = Dialogue(generator, config)
    chat_module._answer(conversation, "what?", console, config)
    assert conversation.messages[-1] == {"role": "assistant", "content": "A cat.", "reasoning_content": "let me see"}
    printed = console.file.getvalue()
    assert "\x1b[2;3mlet me see" in printed  # dim italic
    assert "\x1b[2;3m\n\nA cat" not in printed and "A cat" in printed
    assert "think>" not in printed


def pieces(*texts):
    answer = Answer(Request((1,)), (), None)
    return [chat_module.Piece(text, [Token(1, 0.0)], answer) for text in texts]


def test_silence_is_not_kept(generator):
    conversation = Dialogue(generator, CONFIG)
    conversation.ask("one")
    conversation.keep(" \n", "")
    assert conversation.messages == []


def test_control_c_stops_the_answer_and_keeps_what_was_said(generator, monkeypatch):
    def interrupted(self):
        yield from pieces("The cat", " sat")
        raise KeyboardInterrupt

    monkeypatch.setattr(Dialogue, "answer", interrupted)
    printed = talk(generator, ["one", "/clear"])
    assert "The cat sat" in printed and "(stopped)" in printed and "forgotten" in printed


def test_the_clock_times_the_first_token_apart(monkeypatch):
    times = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(chat_module.time, "perf_counter", lambda: next(times))
    clock = Clock()
    for tokens in (1, 4, 0, 4):
        clock.count(tokens)
    assert str(clock) == "[9 tokens, 8.0 tokens/s, first after 2.00 s]"


# Tests that a shell runs in the background inherit an ignored Ctrl-C; a program in a terminal does not.
PROGRAM = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
PROGRAM += "from minimind_jax.inference.chat import run; from minimind_jax.config.generation import ChatConfig; "
PROGRAM += "run(ChatConfig(model=sys.argv[1], max_new_tokens=int(sys.argv[2]), ignore_eos=True))"


def test_a_pipe_is_answered_line_by_line(model_folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_folder), "5"],
        input="hello\n/nothink\n\n你好\n".encode() + b"\xff bad\n",
        capture_output=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode()
    assert "> hello" in printed and "> 你好" in printed and "> \ufffd bad" in printed
    assert printed.count("[5 tokens") == 3


def test_in_a_terminal_control_c_stops_an_answer_and_control_d_leaves(model_folder, tmp_path):
    # An answer that outlasts any pause of this process.
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (folder / "config.json").write_text(json.dumps(config))
    main, child = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), "90000"],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "xterm"},
    )
    os.close(child)
    screen = Screen(main)
    try:
        screen.wait_for("> ")
        os.write(main, b"hello\n")
        screen.wait_for("hello\r\n")
        screen.wait_for_more()  # the answer is under way
        program.send_signal(signal.SIGINT)
        screen.wait_for("(stopped)")
        screen.wait_for("> ")
        program.send_signal(signal.SIGINT)
        screen.wait_for("leaves")
        screen.wait_for("> ")
        os.write(main, b"\x04")
        assert program.wait(timeout=60) == 0
    finally:
        program.kill()
        program.wait()
        os.close(main)


class Screen:
    """What a program writes to its terminal."""

    def __init__(self, descriptor, patience=120):
        self._descriptor, self._patience = descriptor, patience
        self._shown = b""
        os.set_blocking(descriptor, False)

    def wait_for(self, expected):
        """Passes over everything up to and with `expected`."""
        expected = expected.encode()
        self._wait(lambda: expected in self._shown, expected)
        self._shown = self._shown.partition(expected)[2]

    def wait_for_more(self):
        """Until there is text, and not only what controls the terminal."""
        self._wait(lambda: re.sub(rb"\x1b\[[?;\d]*[a-zA-Z]|\s", b"", self._shown), "anything")

    def _wait(self, has_come, what):
        end = time.monotonic() + self._patience
        while not has_come():
            assert time.monotonic() < end, f"{what!r} did not appear; the screen shows {self._shown!r}"
            try:
                self._shown += os.read(self._descriptor, 65536)
            except OSError:
                time.sleep(0.02)


CALL = '<tool_call>\n{"name": "calculate_math", "arguments": {"expression": "6*7"}}\n</tool_call>'


@pytest.fixture(scope="module")
def calculator():
    with Toolbox(["calculator"]) as tools:
        yield tools


@pytest.fixture(scope="module")
def roomy(model_folder, generator):
    """The model with a context for schemas of tools: 1,500 tokens."""
    model, params = load_model(model_folder)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position_embeddings=1500))
    return Engine(model, params, generator.tokenizer)


def use_tools(generator, calculator, monkeypatch, *answers, **settings):
    """What the chat prints and remembers where the model answers so; prompts, tools and results are real."""
    answers, prompts = iter(answers), []

    def answer(self):
        prompts.append(generator.tokenizer.decode(self._prompt(self.messages), skip_special_tokens=False))
        yield from pieces(*next(answers))

    monkeypatch.setattr(Dialogue, "answer", answer)
    config = ChatConfig(model="tiny", show_speed=False, **settings)
    conversation = Dialogue(generator, config, calculator)
    console = Console(file=io.StringIO(), width=200, markup=False, emoji=False, highlight=False)
    chat_module._answer(conversation, "What is 6*7?", console, config)
    return console.file.getvalue(), conversation.messages, prompts


def test_a_call_is_carried_out_and_its_result_goes_to_the_model(roomy, calculator, monkeypatch):
    printed, messages, prompts = use_tools(roomy, calculator, monkeypatch, [CALL[:20], CALL[20:]], ["It is 42."])
    assert messages == [
        {"role": "user", "content": "What is 6*7?"},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": '{"result": "42"}'},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert 'calculate_math -> {"result": "42"}\nIt is 42.' in printed
    assert '"name": "calculate_math"' in prompts[0]  # the schema
    expected = [*messages[:1], {**messages[1], "content": "", "tool_calls": parsed(CALL)}, messages[2]]
    assert prompts[1] == render(expected, calculator.schemas, True)  # as it is trained


def parsed(text):
    return [{"name": call.name, "arguments": call.arguments} for call in parse_calls(text)[1]]


def test_broken_and_unknown_calls_are_told_to_the_model(roomy, calculator, monkeypatch):
    printed, messages, _ = use_tools(
        roomy, calculator, monkeypatch, ["<tool_call>[1]</tool_call><tool_call>"], [CALL.replace("math", "x")], ["."]
    )
    results = [json.loads(message["content"])["error"] for message in messages if message["role"] == "tool"]
    assert "is a number" in results[0] and "is not JSON" in results[1] and "no tool 'calculate_x'" in results[2]
    assert "call -> " in printed and messages[-1]["content"] == "."


def test_rounds_of_calls_are_limited(roomy, calculator, monkeypatch):
    printed, messages, prompts = use_tools(roomy, calculator, monkeypatch, *[[CALL]] * 9, tool_rounds=2)
    assert [message["role"] for message in messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert "(not carried out: tool_rounds is 2)" in printed and len(prompts) == 3


def test_results_that_fill_the_context_end_the_answer_and_are_forgotten(roomy, calculator):
    config = ChatConfig(model="tiny", show_speed=False)
    conversation = Dialogue(roomy, config, calculator)
    conversation.ask("one")
    conversation.keep("two", "")
    conversation.messages += [{"role": "user", "content": "three"}, {"role": "assistant", "content": CALL}]
    conversation.messages += [{"role": "tool", "content": "xyz " * 900}]
    with pytest.raises(UserError, match="the tools' results fill the model's context of 1500 tokens"):
        next(conversation.answer())
    conversation.forget_question()
    assert [message["content"] for message in conversation.messages] == ["one", "two"]


def test_silence_behind_a_result_takes_the_whole_turn_with_it(roomy, calculator, monkeypatch):
    _, messages, _ = use_tools(roomy, calculator, monkeypatch, [CALL], [" "])
    assert messages == []


def test_without_tools_a_call_is_only_text(generator, monkeypatch):
    _, messages, prompts = use_tools(generator, None, monkeypatch, [CALL])
    assert [message["role"] for message in messages] == ["user", "assistant"] and "<tools>" not in prompts[0]


def test_a_tool_that_is_not_there_is_named_before_the_model_is_loaded():
    with pytest.raises(UserError, match="there is no tool abacus"):
        chat_module.run(ChatConfig(model="no such model", tools=("abacus",)))
