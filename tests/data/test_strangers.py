"""Files as people have them, which would go wrong without a word: records within records, other programs' formats,
records that repeat."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from minimind_jax.config.sections import DataConfig
from minimind_jax.data.batches import open_data
from minimind_jax.data.inspect import inspect
from minimind_jax.data.jsonl import expand_paths, iter_records, tell_left_out
from minimind_jax.data.kinds import kind_of_record, parse_conversation, parse_preference, parse_text
from minimind_jax.data.labels import Classes, find_classes, parse_labelled
from minimind_jax.data.prompts import read_prompt
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from tests.data.format_helpers import ANSWER, TALK, USER, record, write

CLASSES = Classes.any("text", "label")
READERS = {
    "text": parse_text,
    "conversation": parse_conversation,
    "preference": parse_preference,
    "labelled": lambda given: parse_labelled(given, CLASSES),
    "prompt": lambda given: read_prompt(given, DataConfig()),
    "any": kind_of_record,
}


def lines(file, records):
    return write(file, "".join(json.dumps(each) + "\n" for each in records))


@pytest.fixture
def tokenizer(world):
    return Tokenizer.load(world.folder / "tokenizer")


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), seq_len=64, tokenizer_workers=1)


# Records within records


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"data": [{"a": 1}] * 3}, r"\['data'\] \(3 objects\)"),
        ({"version": "1", "train": [{"a": 1}] * 3, "test": [{"a": 1}]}, r"\['train'\] \(3 objects\)"),
        ({"nlu": {"examples": [{"a": 1}] * 3}}, r"\['nlu'\]\['examples'\] \(3 objects\)"),
        ({"a7": {"q": 1}, "b9": {"q": 2}}, r"\.values\(\) \(2 objects\)"),
    ],
    ids=["data", "splits", "deeper", "by id"],
)
def test_records_within_a_record_are_found_and_the_way_out_is_told(read, value, path):
    with pytest.raises(UserError, match=rf"if {path} are the records: python -c .*RECORDS\.jsonl"):
        read(record(value))


def test_the_way_out_works(tmp_path):
    file = write(tmp_path / "a.json", json.dumps({"data": [{"text": "ü"}, {"text": "b"}]}))
    (whole,) = iter_records([file])
    with pytest.raises(UserError) as told:
        parse_text(whole)
    code = str(told.value).partition('python -c "')[2].partition('" >')[0].replace("FILE", str(file))
    printed = []
    exec(code, {"print": printed.append})
    assert [json.loads(line) for line in printed] == [{"text": "ü"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("line", "expected"),
    [('"ü"', {"text": "ü"}), ('["a", "b"]', {"prompt": "a", "response": "b"})],
    ids=["a text", "a question and its answer"],
)
def test_lines_that_are_no_objects_are_made_into_some(tmp_path, line, expected):
    file = write(tmp_path / "a.jsonl", f"{line}\n")
    with pytest.raises(UserError, match=r"expected an object, .* > RECORDS\.jsonl writes such") as told:
        list(iter_records([file]))
    code = str(told.value).partition('python -c "')[2].partition('" >')[0].replace("FILE", str(file))
    printed = []
    exec(code, {"print": printed.append})
    assert [json.loads(line) for line in printed] == [expected]
    with pytest.raises(UserError, match="expected an object") as told:  # an array of them has no such lines
        list(iter_records([write(tmp_path / "a.json", f"[{line}, {line}]")]))
    assert "RECORDS" not in str(told.value)


def test_two_questions_in_a_row_are_told():
    twice, once = record({"messages": [USER, USER, ANSWER]}), record({"messages": [USER, ANSWER, USER, ANSWER]})
    for each in (twice, once):
        parse_conversation(each)
    (said,) = (note for _, note in twice.told)
    assert said.startswith("the user speaks twice in a row") and not once.told


@pytest.mark.parametrize("name", ['"; rm -rf ~; "', "$(reboot)", "`reboot`", "a'b", "long" * 20])
def test_what_a_shell_would_run_is_not_proposed_to_it(name):
    with pytest.raises(UserError) as told:
        parse_text(record({name: [{"a": 1}]}))
    assert "python -c" not in str(told.value)


def test_a_record_of_many_levels_is_refused_as_others_are():
    value = {"a": 1}
    for _ in range(900):
        value = {"a": value}
    with pytest.raises(UserError, match="found the fields a"):
        parse_text(record(value))


def test_messages_are_not_taken_for_records():
    with pytest.raises(UserError) as told:
        parse_text(record({"talk": TALK, "id": 1}))
    assert "are the records" not in str(told.value)


@pytest.mark.parametrize("name", ["text", "body2"])
def test_a_table_by_columns(name):
    with pytest.raises(UserError, match=r"if these are columns: .*RECORDS.jsonl"):
        parse_labelled(record({name: {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}), CLASSES)


@pytest.mark.parametrize(
    "table",
    [
        {"title": ["a", "c"], "body": ["b", "d"]},
        {"question": {"0": "a", "1": "c"}, "answer": {"0": "b", "1": "d"}},
        {"columns": ["question", "answer"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]},
    ],
    ids=["lists", "index", "split"],
)
def test_the_command_for_a_table_writes_records(tmp_path, table):
    write(tmp_path / "FILE", json.dumps(table))
    with pytest.raises(UserError, match=r"RECORDS\.jsonl") as told:
        parse_conversation(record(table))
    command = str(told.value)[str(told.value).index("python -c ") :]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    found = [json.loads(line) for line in (tmp_path / "RECORDS.jsonl").open()]
    assert [[*each.values()] for each in found] == [["a", "b"], ["c", "d"]]
    assert [*found[0]] in (["title", "body"], ["question", "answer"])


# Other programs' formats


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "%PDF-1.4\n1 0 obj\n", "this is a PDF"),
        ("a.txt", r"{\rtf1\ansi hello}", "this is rich text"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', r"a\.txt:1: these are records of JSON .* ends in \.jsonl"),
        ("a.md", '[\n {"text": "a"},\n {"text": "b"}\n]', r"a\.md:1: these are records of JSON"),
        ("a.jsonl", "{'messages': [{'role': 'user'}]}\n", "not JSON: .*; Python printed this"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_refused(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        list(iter_records([write(tmp_path / name, text)]))


def test_messages_that_python_printed():
    with pytest.raises(UserError, match=r"messages is a string; expected a list of messages; Python printed this"):
        parse_conversation(record({"messages": str(TALK)}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!DOCTYPE html>\n<p>a</p>", "this is HTML"),
        ("1\n00:00:01,000 --> 00:00:02,000\nHello\n", "these are subtitles"),
        ("WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n", "these are subtitles"),
        ("[1] A note.\n", ""),
        ('{"a": 1} is JSON.\n', ""),
        ("1\nOnce upon a time\n", ""),
    ],
)
def test_documents_with_a_form_of_their_own_are_told(tmp_path, text, told):
    (found,) = iter_records([write(tmp_path / "a.txt", text)])
    assert [note.startswith(told) for _, note in found.told] == [True] * bool(told)


# Records that repeat


def chats(*words):
    return [{"messages": [USER, {**ANSWER, "content": word}]} for word in words]


def test_records_that_repeat_are_counted(tmp_path, tokenizer, data, capsys):
    repeated = [*chats(*"abcd"), {"conversations": [USER, {"from": "gpt", "value": "a"}]}, *chats("b")]
    cache = build_cache("conversation", [lines(tmp_path / "a.jsonl", repeated)], tokenizer, data, seed=1)
    assert len(cache) == 6 and len(set(cache.keys.tolist())) == 4
    assert "2 of 6 conversations repeat others word for word" in capsys.readouterr().err
    build_cache("conversation", [lines(tmp_path / "b.jsonl", chats(*"abcd"))], tokenizer, data, seed=1)
    assert "repeat" not in capsys.readouterr().err


def test_repeats_are_counted_where_whole_pieces_of_a_file_are_broken(tmp_path, tokenizer, data, monkeypatch, capsys):
    monkeypatch.setattr("minimind_jax.data.tokenise.CHUNK_BYTES", 1)
    records = [{"text": "one", "label": "a"}, {"text": "", "label": "a"}, {"text": "one", "label": "a"}]
    skipping = dataclasses.replace(data, on_error="skip")
    file = lines(tmp_path / "a.jsonl", records)
    build_cache("labelled", [file], tokenizer, skipping, seed=1, classes=Classes(("a", "b")))
    assert "1 of 2 texts repeat others word for word" in capsys.readouterr().err


def test_texts_with_several_labels_are_counted(tmp_path, tokenizer, data, capsys):
    rows = [("one", "a"), ("one", "b"), ("two", "a"), ("two", "a"), ("three", "b")]
    file = lines(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    build_cache("labelled", [file], tokenizer, data, seed=1, classes=Classes(("a", "b")))
    told = capsys.readouterr().err
    assert "1 of 3 different texts have several records, and not all the same label" in told
    assert "1 of 5 texts repeat others word for word" in told


@pytest.mark.parametrize("how", ["files", "share"])
def test_held_out_records_that_are_trained_on_are_told(world, tmp_path, tokenizer, how, capsys):
    train = lines(tmp_path / "train.jsonl", chats(*"abcdefgh") if how == "files" else chats(*"aabbccdd"))
    val = (str(lines(tmp_path / "val.jsonl", chats(*"abz"))),) if how == "files" else ()
    changes = {"train": (str(train),), "val": val, "val_fraction": None if val else 0.3}
    config = world.sft(tmp_path / "run", data=changes)
    _, held_out = open_data("conversation", config, tokenizer)
    count = 2 if how == "files" else len(held_out.keys)
    told = capsys.readouterr().out
    assert how == "share" or f"warning: {count} of the 3 held-out conversations are trained on, too" in told
    assert how == "files" or "held-out conversations are trained on, too" in told


# Labels, pairs, conversations, prompts, folders


def test_labels_of_a_single_text_are_told(tmp_path):
    told = []
    records = [{"text": "t", "label": label} for label in ["billing", "bug"] * 10 + ["biling"]]
    find_classes([lines(tmp_path / "a.jsonl", records)], "text", "label", tell=told.append)
    assert told == ["labels of a single text, which may be slips: 'biling'"]


@pytest.mark.parametrize(("scores", "words"), [((1, 5), ["swapped"]), ((5, 5), ["are equal"]), ((5, 1), [])])
def test_scores_that_do_not_prefer_the_chosen_answer_are_told(scores, words):
    given = dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    found = record({"prompt": "p", "chosen": "a", "rejected": "b", **given})
    parse_preference(found)
    assert re.findall("swapped|are equal", str(found.told)) == words


@pytest.mark.parametrize(("talk", "count"), [(TALK, 0), ([ANSWER, *TALK], 1), ([*TALK, USER], 1), ([ANSWER, USER], 2)])
def test_conversations_in_an_odd_order_are_told(talk, count):
    found = record({"messages": talk})
    parse_conversation(found)
    assert len(found.told) == count


def test_inspect_tells_how_prompts_are_shown(tmp_path, tokenizer, data, capsys):
    file = lines(tmp_path / "a.jsonl", [{"prompt": "the cat", "answer": "4"}])
    inspect([file], tokenizer, data)
    assert "--kind prompt shows them as grpo, ppo and agent ask them" in capsys.readouterr().out
    inspect([file], tokenizer, data, kind="prompt")
    inspect([lines(tmp_path / "b.jsonl", chats("a"))], tokenizer, data)
    assert "--kind prompt" not in capsys.readouterr().out
    with pytest.raises(UserError, match="data inspect --kind prompt"):
        inspect([lines(tmp_path / "c.jsonl", [{"prompt": "the cat"}])], tokenizer, data)


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path):
    folder = tmp_path / "data [1]"
    (folder / "below").mkdir(parents=True)
    files = [lines(folder / name, [{"text": "a"}]) for name in ("a.jsonl", "below/b.jsonl")]
    assert expand_paths([f"{folder}/*.jsonl"]) == files[:1]
    assert expand_paths([f"{folder}/*/*.jsonl"]) == files[1:]
    assert sorted(expand_paths([f"{folder}/**/*.jsonl"])) == files


def test_splits_that_are_read_with_the_rest_are_told(tmp_path, capsys):
    for name in ("train.jsonl", "test.jsonl", "dev_2.jsonl", "testimony.jsonl"):
        lines(tmp_path / name, [{"text": "a"}])
    tell_left_out([tmp_path])
    told = capsys.readouterr().err
    assert "read as all others: " in told and "dev_2.jsonl" in told and "testimony" not in told


# Exports of other programs


def node(parent, role, *parts, recipient="all", **content):
    message = {
        "author": {"role": role},
        "recipient": recipient,
        "content": {"content_type": "text", "parts": list(parts)},
    }
    message["content"] |= content
    return {"parent": parent, "message": message}


def export(**nodes):
    return {
        "title": "t",
        "mapping": {"root": {"parent": None, "message": None}, **nodes},
        "current_node": list(nodes)[-1],
    }


def test_the_branch_of_a_chatgpt_conversation_that_was_shown_last_is_read():
    given = record(
        export(
            hidden=node("root", "system", ""),
            asked=node("hidden", "user", "2 + 2?"),
            first=node("asked", "assistant", "5"),
            code=node("asked", "assistant", "print(2 + 2)", recipient="python"),
            ran=node("code", "tool", "4"),
            thought=node("ran", "assistant", content_type="thoughts", thoughts=[{"summary": "easy"}]),
            again=node("thought", "assistant", "4"),
        )
    )
    read = parse_conversation(given).messages
    assert [(message["role"], message["content"]) for message in read] == [("user", "2 + 2?"), ("assistant", "4")]
    told = " ".join(note for _, note in given.told)
    assert "from and to tools are left out" in told
    assert "thoughts are left out" in told


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"mapping": {"a": {"parent": "b", "message": None}}, "current_node": "a"}, "no node 'b'"),
        ({"mapping": {"a": {"parent": "a", "message": None}}, "current_node": "a"}, "no node 'a'"),
        ({"mapping": [1], "current_node": "a"}, "no node 'a'"),
        ({"mapping": {"a": {"parent": None, "message": "hi"}}, "current_node": ["a"]}, "no node"),
        ({"mapping": {"a": {"parent": None, "message": "hi"}}, "current_node": "a"}, "no words"),
        (
            {"mapping": {"a": {"parent": None, "message": {"author": "me", "content": "x"}}}, "current_node": "a"},
            "no words",
        ),
        (export(a=node("root", "system", "be kind")), "no words of user or assistant"),
        ({"contents": "hi"}, "expected a list of messages"),
        ({"contents": ["hi"]}, r"contents\[0\] is"),
        ({"contents": [{"role": "user"}]}, "content"),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}]}, "inlineData"),
        ({"messages": [{"from": "Anna", "text": "hi"}]}, "of people who talk"),
        ({"messages": [{"author": {"name": "Anna"}, "content": "hi"}]}, "of people who talk"),
    ],
)
def test_an_export_that_cannot_be_read_says_why(value, said):
    with pytest.raises(UserError, match=said):
        parse_conversation(record(value))


def test_contents_of_gemini_are_messages():
    turns = [{"role": "user", "parts": [{"text": "2 + "}, {"text": "2?"}]}, {"role": "model", "parts": {"text": "4"}}]
    read = parse_conversation(record({"systemInstruction": {"parts": [{"text": "count"}]}, "contents": turns})).messages
    assert [(message["role"], message["content"]) for message in read] == [
        ("system", "count"),
        ("user", "2 + 2?"),
        ("assistant", "4"),
    ]
