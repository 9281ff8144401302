"""`minimind generate`: prompts, files of every record kind, and what it refuses."""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from templates import DEEPSEEK, QWEN3, with_template

from minimind_jax.config.generation import GenerateConfig
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.written import json_line
from minimind_jax.errors import UserError
from minimind_jax.inference.answer_file import AnswerFile, PartialFile, what_makes
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.generate_command import _request, _result, answer_requests, run
from minimind_jax.inference.load import load_engine

RECORDS = [
    {"prompt": "The cat", "id": 7},
    {"text": "你好", "nested": {"kept": [1]}},
    {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "reference"}]},
    {"conversations": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]},
    {"prompt": "last"},
]


@pytest.fixture(scope="module")
def generator(model_folder):
    return load_engine(str(model_folder))


@pytest.fixture
def config(model_folder, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return GenerateConfig(
        model=str(model_folder),
        input=str(source),
        output=str(tmp_path / "out.jsonl"),
        max_new_tokens=9,
        temperature=1.0,
        batch_size=2,
        seed=3,
    )


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_every_record_is_kept_and_answered_in_order(config, generator, capsys):
    run(config)
    written = lines(config.output)
    for index, (record, result) in enumerate(zip(RECORDS, written, strict=True)):
        text = record.get("prompt") or record.get("text")
        messages = record.get("conversations") or [{"role": "user", "content": text}]
        asked = [message for message in messages if message["role"] != "assistant"]
        ids = encode_prompt(generator.tokenizer, asked, open_thinking=False)
        [expected] = generator.generate([ids], dataclasses.replace(config.resolve(generator.sampling), seed=3 + index))
        assert result == {**record, "completion": expected.text, "finish_reason": expected.finish_reason}
    assert "5 records written" in capsys.readouterr().out
    assert not os.path.exists(config.output + ".partial")


def test_the_batch_size_does_not_change_the_answers(config):
    run(config)
    before = lines(config.output)
    run(dataclasses.replace(config, batch_size=16, resume="never"))
    assert lines(config.output) == before


def test_raw_text_is_continued_after_the_begin_token(config, generator, tmp_path, capsys):
    run(dataclasses.replace(config, input=(), output="", prompt="The cat", raw=True))
    tokenizer, sampling = generator.tokenizer, config.resolve(generator.sampling)
    [expected] = generator.generate([[tokenizer.bos_id, *tokenizer.encode("The cat")]], sampling)
    assert capsys.readouterr().out == expected.text + "\n"


def test_several_prompts_are_printed_with_their_answers(config, generator, capsys):
    run(dataclasses.replace(config, input=(), output="", prompt=("one", "two"), system="Be brief."))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    ids = encode_prompt(generator.tokenizer, messages, open_thinking=False)
    [expected] = generator.generate([ids], dataclasses.replace(config.resolve(generator.sampling), seed=4))
    assert f"> two\n{expected.text}\n" in capsys.readouterr().out


def test_an_output_s_name_promises_no_other_form(config, tmp_path):
    for name in ("out.csv", "out.parquet", "out.jsonl.gz"):
        with pytest.raises(UserError, match="JSON lines are written"):
            run(dataclasses.replace(config, output=str(tmp_path / name)))


def test_without_output_the_records_are_printed(config, capsys, monkeypatch):
    monkeypatch.setattr("minimind_jax.progress.LINE_EVERY", 0.001)
    run(dataclasses.replace(config, output=""))
    printed = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in printed.out.splitlines()]
    assert "answering, 0 of " in printed.err


@pytest.mark.parametrize(
    "record, changes, message",
    [
        ({"riddle": "?"}, {}, "in.jsonl:1: expected a field `prompt` or `text`"),
        ({"prompt": 3}, {}, "in.jsonl:1: expected a field `prompt` or `text`"),
        ({"conversations": [{"role": "user", "content": "a"}]}, {"raw": True}, "in.jsonl:1: .*drop raw"),
        ({"conversations": [{"role": "assistant", "content": "a"}]}, {}, "in.jsonl:1: .*expected a question"),
        ({"conversations": [{"role": "robot", "content": "a"}]}, {}, "in.jsonl:1: .*unknown role 'robot'"),
        ({"prompt": "xyz " * 500}, {}, "in.jsonl:1: a prompt of .* tokens leaves no room .* context of 640"),
        (
            {"prompt": "x"},
            {"max_new_tokens": 640},
            "in.jsonl:1: a prompt of .* leaves 6.. in .*, fewer than max_new_tok",
        ),
    ],
)
def test_a_record_that_cannot_be_answered_is_named(config, record, changes, message):
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("as_conversations", [False, True])
def test_a_call_goes_on_behind_what_an_error_or_a_kill_left(config, as_conversations, capsys):
    config = dataclasses.replace(config, as_conversations=as_conversations)
    run(config)
    whole, partial = lines(config.output), config.output + ".partial"
    os.remove(config.output)
    good = open(config.input[0], encoding="utf-8").read()
    with open(config.input[0], "a", encoding="utf-8") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"in.jsonl:6"):
        run(config)
    assert lines(partial) == whole  # all that stand before it
    with open(partial, "a", encoding="utf-8") as file:
        file.write('{"prompt": "la')  # a kill in the middle of a line
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.write(good)
    with pytest.raises(UserError, match=r"was made with temperature 1.0, now it is 0.5; .*--resume never"):
        run(dataclasses.replace(config, temperature=0.5))
    capsys.readouterr()
    run(dataclasses.replace(config, batch_size=16))
    assert lines(config.output) == whole
    assert "going on behind 5 records" in capsys.readouterr().out
    assert [name for name in os.listdir(os.path.dirname(config.output)) if "partial" in name] == []


def test_answers_are_not_put_behind_those_of_other_records(config):
    with open(config.input[0], "a", encoding="utf-8") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"in.jsonl:6"):
        run(config)
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in [*RECORDS[:2], {"prompt": "new"}, *RECORDS[2:]]))
    with pytest.raises(UserError, match=r"out.jsonl.partial:3 does not answer .*in.jsonl:3: the input has changed"):
        run(config)
    run(dataclasses.replace(config, resume="never"))
    assert [record.get("prompt") for record in lines(config.output)] == ["The cat", None, "new", None, None, "last"]


def test_answers_become_conversations_to_train_on(config, generator, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with open(config.input[0], "a", encoding="utf-8") as file:
        system = {"role": "system", "content": "", "tools": json.dumps(tools)}
        file.write(json.dumps({"conversations": [system, {"role": "user", "content": "call"}], "id": 9}) + "\n")
    run(config)
    plain = lines(config.output)
    told = dataclasses.replace(config, as_conversations=True, system="Be kind.", resume="never")
    run(dataclasses.replace(told, system=""))
    for record, result, answered in zip([*RECORDS, None], lines(config.output), plain, strict=True):
        *asked, reply = result["conversations"]
        if record and "conversations" not in record:
            assert asked == [{"role": "user", "content": record.get("prompt") or record.get("text")}]
            assert result.get("id") == record.get("id") and "prompt" not in result and "text" not in result
        assert reply.pop("role") == "assistant"
        if "think>" not in answered["completion"]:  # random weights make these tags, too
            assert reply == {"content": answered["completion"].strip()}
    assert parse_conversation(list(iter_records([config.output]))[5]).tools == tools
    run(told)
    assert lines(config.output)[0]["conversations"][0] == {"role": "system", "content": "Be kind."}


def test_lines_that_every_reader_takes(config):
    made = {"prompt": "hi", "at": datetime.date(2026, 1, 2), "x": float("nan"), "raw": b"a", "half": "\ud800", "n": [1]}
    line = json_line(made)
    line.encode()
    assert json.loads(line, parse_constant=pytest.fail) == made | {"at": "2026-01-02", "x": None, "raw": "b'a'"}
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.write('{"prompt": "hi \\ud800"}\n')
    with pytest.raises(UserError, match=r"in.jsonl:1: prompt has half a surrogate pair"):
        run(config)


def test_two_calls_do_not_write_one_file(tmp_path):
    with AnswerFile(tmp_path / "out.jsonl", {}, True) as file:
        with pytest.raises(UserError, match="is being written by another process"):
            AnswerFile(tmp_path / "out.jsonl", {}, True)
        file.write({"finish_reason": "stop"})
        file.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("arguments", [(), ({}, True)], ids=["partial", "answers"])
def test_a_full_disk_is_told(arguments, tmp_path):
    with pytest.raises(UserError, match="cannot write: No space left on device; make room and give the same"):
        with (AnswerFile if arguments else PartialFile)(tmp_path / "out.jsonl", *arguments) as file:
            file._file.close()
            file._file = open("/dev/full", "wb")
            file.write({"completion": "a"})


@pytest.mark.parametrize(
    ("partial", "settings", "message"),
    [
        (b'{"finish_reason": "stop"}\n', None, "without out.jsonl.partial.settings"),
        (b'{"finish_reason": "stop"}\n', b"[]", "without out.jsonl.partial.settings"),
        (b'{"finish_reason": "stop"}\ngarbage\n', b'{"a": 1}', "partial:2 is damaged"),
        (b"\0\0\0\n", b'{"a": 1}', "partial:1 is damaged"),
        (b"[]\n", b'{"a": 1}', "partial:1 is damaged"),
        (b"[]\n", b'{"a": 2}', "was made with a 2, now it is 1"),
    ],
)
def test_a_damaged_partial_file_is_told(partial, settings, message, tmp_path):
    (tmp_path / "out.jsonl.partial").write_bytes(partial)
    if settings is not None:
        (tmp_path / "out.jsonl.partial.settings").write_bytes(settings)
    with pytest.raises(UserError, match=message):
        AnswerFile(tmp_path / "out.jsonl", {"a": 1}, True)
    AnswerFile(tmp_path / "out.jsonl", {"a": 1}, False)


def test_another_model_is_told(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = GenerateConfig(model="m", input=("a",), output=str(tmp_path / "out.jsonl"))
    with AnswerFile(tmp_path / "out.jsonl", what_makes(config, [folder]), True) as file:
        file.write({"finish_reason": "stop"})
    (folder / "config.json").touch()
    assert AnswerFile(tmp_path / "out.jsonl", what_makes(config, [folder]), True).earlier == [{"finish_reason": "stop"}]
    (folder / "config.json").write_text("{} ")
    with pytest.raises(UserError, match=r"was made with another model \(config.json differs\)"):
        AnswerFile(tmp_path / "out.jsonl", what_makes(config, [folder]), True)


def test_nothing_is_written_over(config, tmp_path):
    with pytest.raises(UserError, match=r"in.jsonl is one of the files of input"):
        run(dataclasses.replace(config, output=config.input[0]))
    (tmp_path / "out.jsonl").write_text("answers\n")
    with pytest.raises(UserError, match=r"out.jsonl is there already and is complete"):
        run(config)
    assert (tmp_path / "out.jsonl").read_text() == "answers\n"


def test_thinking_becomes_reasoning_content(config, generator):
    [record] = list(iter_records(config.input))[:1]
    config = dataclasses.replace(config, as_conversations=True, thinking=True)
    request = _request(generator, config, record)
    reply = _result(config, request, "why not\n</think>\n\nYes.", "stop")["conversations"][-1]
    assert reply == {"role": "assistant", "content": "Yes.", "reasoning_content": "why not"}


def test_an_output_that_cannot_be_written_is_named_before_the_work(config, tmp_path):
    for output, message in (("/nowhere/at/all.jsonl", "there is no folder"), (str(tmp_path), "is a folder")):
        with pytest.raises(UserError, match=message):
            run(dataclasses.replace(config, output=output, model="not looked at"))
    with pytest.raises(UserError, match=r"cannot write: File name too long"):
        run(dataclasses.replace(config, output=str(tmp_path / ("x" * 250))))


def test_without_a_number_an_answer_takes_the_room_that_is_left(config, generator, tmp_path):
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": "cat " * n}) + "\n" for n in (1, 150, 2))
    lengths = []
    for batch_size in (1, 3):
        open_ended = dataclasses.replace(config, max_new_tokens=None, ignore_eos=True, batch_size=batch_size)
        requests = [_request(generator, open_ended, record) for record in iter_records(open_ended.input)]
        answers = [answer for _, answer in answer_requests(generator, open_ended, iter(requests))]
        lengths.append([answer.text for answer in answers])
        counts = [len(answer.ids) for answer in answers]
        assert counts == [min(512, generator.room(len(request.ids))) for request in requests]
    assert counts[0] == counts[2] == 512 > counts[1] and lengths[0] == lengths[1]


def test_bytes_that_are_no_text_become_replacement_characters(config, capsys):
    bad = os.fsdecode(b"a\xff\xe4b")
    made = dataclasses.replace(config, input=(), output="", prompt=bad, system=bad, stop=bad)
    assert made.prompt == made.stop == ("a\ufffd\ufffdb",) and made.system == made.prompt[0]
    run(made)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "m"}, "prompt and input are both empty"),
        ({"model": "m", "prompt": "a", "input": "b"}, "prompt and input are both given"),
        ({"model": "m", "prompt": "a", "output": "b"}, "output is set without input"),
        ({"model": "m", "prompt": "a", "as_conversations": True}, "as_conversations is set without input"),
        ({"model": "m", "prompt": "a", "raw": True, "thinking": True}, "raw leaves the chat template out"),
        ({"model": "m", "prompt": "a", "batch_size": 0}, "batch_size is 0"),
        ({"model": "m", "prompt": "a", "top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


@pytest.mark.parametrize(
    ("template", "thinking", "text", "expected"),
    [
        (QWEN3, True, "Five.", ("Five.", None)),
        (QWEN3, True, "<think>\nI count.\n</think>\n\nFive.", ("Five.", "I count.")),
        (QWEN3, False, "Five.", ("Five.", None)),
        (DEEPSEEK, False, "I count.\n</think>\n\nFive.", ("Five.", "I count.")),
        (None, True, "I count.\n</think>\n\nFive.", ("Five.", "I count.")),
        (None, False, "Five.", ("Five.", None)),
    ],
)
def test_the_prompt_tells_thinking_from_the_answer(template, thinking, text, expected, generator, tmp_path):
    if template:
        tokenizer = with_template(generator.tokenizer.folder, tmp_path / "tokenizer", template)
        generator = Engine(generator.model, generator.params, tokenizer)
    config = GenerateConfig(model="m", input="a.jsonl", as_conversations=True, thinking=thinking)
    for record in ({"prompt": "How many?"}, {"conversations": [{"role": "user", "content": "How many?"}]}):
        request = _request(generator, config, Record("a.jsonl:1", tmp_path, 1, record))
        reply = _result(config, request, text, "stop")["conversations"][-1]
        assert (reply["content"], reply.get("reasoning_content")) == expected


FORMATS = [
    {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "why?"}]},
    {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "no"}], "system": "Be brief."},
    {"instruction": "why?", "input": "", "output": "no", "system": "Be brief."},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}], "id": 3},
    {"prompt": "why?", "system": "Be brief."},
]


def test_prompts_of_every_format_ask_the_same(config, generator):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    for line, record in enumerate(FORMATS, 1):
        request = _request(generator, config, Record(f"in.jsonl:{line}", Path("in.jsonl"), line, record))
        assert request.ids == encode_prompt(generator.tokenizer, asked)
        assert set(request.others) <= {"id"}


def test_a_record_says_whether_its_answer_may_think(config, generator):
    def ids(config, **variables):
        value = {"messages": [{"role": "user", "content": "why?"}], "chat_template_kwargs": variables}
        return _request(generator, config, Record("in.jsonl:1", Path("in.jsonl"), 1, value)).ids

    thinks = dataclasses.replace(config, thinking=True)
    assert ids(config, enable_thinking=True) == ids(thinks) != ids(config) == ids(thinks, enable_thinking=False)
    with pytest.raises(UserError, match=r"in\.jsonl:1: chat_template_kwargs has 'effort'"):
        ids(config, effort="high")


LONG = [{"prompt": "first"}, {"prompt": "cat " * 700 + "end"}, {"prompt": "second"}, {"prompt": "dog " * 800}]


@pytest.fixture
def long_prompts(config):
    with open(config.input[0], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in LONG)
    return config


def test_long_prompts_are_all_named_before_anything_is_generated(long_prompts):
    with pytest.raises(UserError) as caught:
        run(long_prompts)
    assert all(f"in.jsonl:{line}: a prompt of" in str(caught.value) for line in (2, 4))
    assert "in.jsonl:1" not in str(caught.value) and "--long_prompts skip" in str(caught.value)
    assert not os.path.exists(long_prompts.output + ".partial") and not os.path.exists(long_prompts.output)


@pytest.mark.parametrize(("how", "asked"), [("skip", [0, 2]), ("cut", [0, 1, 2, 3])])
def test_long_prompts_are_left_out_or_cut_by_choice(long_prompts, how, asked, capsys):
    run(dataclasses.replace(long_prompts, long_prompts=how))
    answered = lines(long_prompts.output)
    assert [result["prompt"] for result in answered] == [LONG[i]["prompt"] for i in asked]
    done = {"skip": "left out", "cut": "cut to their end"}[how]
    assert f"2 prompts were too long and {done}" in capsys.readouterr().out


def test_a_cut_prompt_keeps_its_frame_and_its_end(config, generator):
    talk = [{"role": "system", "content": "s"}]
    talk += [{"role": role, "content": f"{role} " * 40} for role in ("user", "assistant")] * 20
    for value, kept in (
        ({"messages": [*talk, {"role": "user", "content": "last"}]}, "last"),
        ({"prompt": "cat " * 700 + "end", "system": "s"}, "end"),
    ):
        request = _request(generator, config, Record("in.jsonl:1", Path("in.jsonl"), 1, value), cut=True)
        assert generator.room(len(request.ids)) >= config.max_new_tokens
        first, *_, last = request.conversation.messages
        assert first == talk[0] and last["content"].endswith(kept)
        assert request.ids == encode_prompt(generator.tokenizer, request.conversation.messages)


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_the_next_call(model_folder, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    subprocess.run(
        [sys.executable, "-m", "minimind_jax", "generate", "--model", model_folder, "--prompt", "cat"],
        env={**environment, "MINIMIND_CACHE": str(tmp_path)}, check=True,
    )  # fmt: skip
    kept = {file.name.partition("-")[0] for file in (tmp_path / "xla").iterdir()}
    assert {"jit_read", "jit_choose", "jit_make"} <= kept
