"""`minimind data convert`: what it writes, what it says, and what it refuses."""

import json

import pytest

from minimind_jax.cli import main

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def written(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def convert(*arguments):
    return main(["data", "convert", *map(str, arguments)])


def test_files_of_several_formats_become_one_of_ours(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": TALK, "id": 1}, {"instruction": "q", "output": "a"}]))
    (tmp_path / "b.csv").write_text("Frage;Antwort\nq;a\n")
    out = tmp_path / "out.jsonl"
    renamed = ("--rename", "Frage=instruction", "Antwort=output")
    assert convert(tmp_path / "a.json", tmp_path / "b.csv", out, *renamed) == 0
    assert written(out) == [{"conversations": TALK}] * 3
    told = capsys.readouterr()
    assert "3 records written to" in told.out and "messages (1), instruction and output (2)" in told.out
    assert "a.json: `id` is ignored (once)" in told.err


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"body": "t", "id": 1}, {"text": "t"}),
        ({"content": "t", "label": "x"}, {"text": "t", "label": "x"}),
        ({"text": "t", "labels": '["x", "y"]'}, {"text": "t", "label": ["x", "y"]}),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1},
            {"chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "b"}], "margin": 2.0},
        ),
    ],
)
def test_each_kind_is_found_from_the_record(tmp_path, row, ours):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert convert(tmp_path / "a.jsonl", tmp_path / "out.jsonl") == 0
    assert written(tmp_path / "out.jsonl") == [ours]


def test_broken_records_stop_or_are_skipped(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + '\nnope\n{"messages": [{"role": "bot"}]}\n')
    out = tmp_path / "out.jsonl"
    assert convert(tmp_path / "a.jsonl", out) == 2
    assert "a.jsonl:2: not JSON" in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.jsonl"
    ]
    assert convert(tmp_path / "a.jsonl", out, "--on_error", "skip") == 0
    assert len(written(out)) == 1 and "2 records skipped; the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.jsonl", "a.jsonl"), "is one of the files of input"),
        (("a.jsonl", "b.jsonl"), "is there already"),
        (("a.jsonl", "out.csv"), "a name ending in .jsonl"),
        (("a.jsonl", "no/out.jsonl"), "there is no folder"),
        (
            ("b.jsonl", "out.jsonl"),
            "has the fields ask; docs/data.md lists all, --rename OLD=NEW",
        ),
        (("a.jsonl", "out.jsonl", "--rename", "x"), "expected OLD=NEW"),
        (("c.jsonl", "out.jsonl", "--rename", "text=note"), "the field 'note' is there already"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "b.jsonl").write_text('{"ask": "t"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "t", "note": "n"}\n')
    assert convert(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("header", "kind", "command"),
    [
        ("Text;Label", None, "--rename Text=text Label=label gives"),
        ("TEXT;LABEL", "labelled", "names another: TEXT)"),
        ("Body; x", "text", "names another field: Body)"),
        ("Instruction;OUTPUT", "conversation", "--rename Instruction=instruction OUTPUT=output`"),
        ("Text;TEXT", None, "--rename OLD=NEW"),
    ],
)
def test_headers_in_another_case_are_named_with_the_way_out(tmp_path, capsys, header, kind, command):
    """Excel's, in capitals; spaces around a header do not count."""
    file, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    kind = ("--kind", kind) if kind else ()
    file.write_text(f"{header}\ngood day;a\nbad day;b\n")
    assert convert(file, output, *kind) == 2 and command in capsys.readouterr().err
    if "=text" in command:
        assert convert(file, output, *kind, "--rename", "Text=text", "Label=label") == 0
    file.write_text(f" {header.lower()} \ngood day;a\nbad day;b\n")
    if header != "Text;TEXT":
        assert convert(file, tmp_path / "spaces.jsonl", *kind) == 0
