"""What `minimind data inspect` prints and finds."""

import io
import json
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from minimind_jax.config.sections import DataConfig
from minimind_jax.data.inspect import (
    Inspection,
    _print_lengths,
    _print_packings,
    detect_kind,
    inspect,
    pieces_of,
    printable,
)
from minimind_jax.data.packing import PackingPlan
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError

TALKS = [
    [("user", f"How old is [red]cat {i}[/red]?"), ("assistant", f"It is {i} years old. " * (1 + i))] for i in range(12)
]
TEXTS = [f"The cat is {i} years old." for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [content for talk in TALKS for _, content in talk] + TEXTS
    return train_bpe(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=360)


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), seq_len=64, tokenizer_workers=1, system_prompt_probability=0.0)


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def talk_records():
    return [{"conversations": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]


def printed(paths, tokenizer, data, colours=False, **options):
    console = Console(
        file=io.StringIO(), width=120, force_terminal=colours, color_system="standard" if colours else None
    )
    found = inspect(paths, tokenizer, data, console=console, **options)
    return found, console.file.getvalue()


def test_conversations_with_their_trained_tokens_marked(tmp_path, tokenizer, data):
    found, text = printed([write(tmp_path / "a.jsonl", talk_records())], tokenizer, data, rows=2)
    assert found.cache.kind == "conversation"
    assert "record 1, " in text and "record 2, " in text and "record 3, " not in text
    assert "<|im_start|>user\nHow old is [red]cat 1[/red]?<|im_end|>\n<|im_start|>assistant\n⟦" in text
    assert "It is 1 years old. It is 1 years old. <|im_end|>\n⟧" in text
    trained = sum(int(found.cache.is_trained(d, 0, int(n)).sum()) for d, n in enumerate(found.cache.lengths))
    assert f"{trained:,} ({trained / found.cache.lengths.sum():.1%})" in text
    assert f"{found.cache.lengths.sum():,}, " in text and "12, 0 of them broken" in text


def test_trained_tokens_are_coloured_on_a_terminal(tmp_path, tokenizer, data):
    _, text = printed([write(tmp_path / "a.jsonl", talk_records())], tokenizer, data, colours=True, rows=1)
    green, dim = "\x1b[1;32m", "\x1b[2m"
    answer = text.index("It is 0 years old.")
    assert text.rindex(green, 0, answer) > text.rindex(dim, 0, answer)
    question = text.index("How old is")
    assert text.rindex(dim, 0, question) > text.rfind(green, 0, question)
    assert "⟦" not in text


def test_packing_of_each_kind_is_counted(tmp_path, tokenizer, data):
    found, text = printed([write(tmp_path / "a.jsonl", talk_records())], tokenizer, data)
    tokens = int(found.cache.lengths.sum())
    assert set(found.packings) == {"concat", "best_fit", "pad"}
    assert found.packings["concat"].rows == -(-tokens // 64)
    assert found.packings["pad"].rows == len(TALKS)
    assert found.packings["pad"].dropped_tokens == np.maximum(found.cache.lengths - 64, 0).sum() > 0
    for name, plan in found.packings.items():
        placed = len(set(plan.documents.tolist()))
        (line,) = [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
        assert line[1:5] == [
            str(plan.rows),
            f"{plan.efficiency:.2%}",
            str(placed),
            str(12 - placed),
        ]


def test_a_conversation_whose_answer_does_not_fit_is_lost_in_pad_only(tmp_path, tokenizer, data):
    long_question = [("user", "How old is it? " * 60), ("assistant", "Old.")]
    records = [*talk_records(), {"conversations": [{"role": r, "content": c} for r, c in long_question]}]
    found, _ = printed([write(tmp_path / "a.jsonl", records)], tokenizer, data)
    placed = {name: len(set(plan.documents.tolist())) for name, plan in found.packings.items()}
    assert placed == {"concat": 13, "best_fit": 13, "pad": 12}


def test_text_is_recognised_and_counted_in_bytes(tmp_path, tokenizer, data):
    found, text = printed([write(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])], tokenizer, data, rows=1)
    assert found.cache.kind == "text"
    assert f"<|im_start|>⟦{TEXTS[0]}<|im_end|>⟧" in text
    size = sum(len(t.encode()) for t in TEXTS)
    assert f"{size / found.cache.lengths.sum():.2f} bytes of text each" in text


def test_broken_records_are_listed_with_file_and_line(tmp_path, tokenizer, data):
    records = talk_records()
    records[2] = "no JSON"
    records[5] = {"conversations": [{"role": "user", "content": "[bold]only me[/bold]"}]}
    found, text = printed([write(tmp_path / "a.jsonl", records)], tokenizer, data)
    assert "2 broken records" in text and len(found.cache.lengths) == 10
    assert f"{tmp_path / 'a.jsonl'}:3: not JSON" in text
    assert f"{tmp_path / 'a.jsonl'}:6: nothing to train on" in text


def test_histogram_counts_every_record(tmp_path, tokenizer, data):
    found, text = printed([write(tmp_path / "a.jsonl", talk_records())], tokenizer, data)
    bars = [line.split() for line in text.splitlines() if line.startswith("  up to ")]
    assert sum(int(bar[3]) for bar in bars) == len(TALKS)
    assert int(bars[-1][2].replace(",", "")) >= found.cache.lengths.max()


def test_long_records_are_cut_in_print(tmp_path, tokenizer, data):
    found, text = printed([write(tmp_path / "a.jsonl", [{"text": "The cat sleeps. " * 100}])], tokenizer, data)
    assert f"… and {found.cache.lengths[0] - 64:,} more tokens" in text


def test_unknown_fields_and_unreadable_files_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:1: no format that is read has the fields prompt; docs/data\.md"):
        detect_kind([write(tmp_path / "a.jsonl", [{"prompt": []}])])
    with pytest.raises(UserError, match=r"b\.jsonl: no line is a JSON object"):
        detect_kind([write(tmp_path / "b.jsonl", ["no", "JSON"])])


def test_pieces_are_trained_or_not(tokenizer):
    ids = np.array([id for letter in "abcdef" for id in tokenizer.encode(letter)])
    pieces = pieces_of(tokenizer, ids, np.array([0, 0, 1, 1, 0, 1], bool))
    assert pieces == [("ab", False), ("cd", True), ("e", False), ("f", True)]


def test_a_text_s_own_marks_are_told_from_those_of_what_is_trained(tmp_path, tokenizer, data):
    _, text = printed([write(tmp_path / "a.jsonl", [{"text": "The ⟦cat⟧ sleeps."}])], tokenizer, data)
    assert "<|im_start|>⟦The \\u27e6cat\\u27e7 sleeps.<|im_end|>⟧" in text


def test_what_a_record_tells_the_terminal_to_do_is_shown_and_not_done(tmp_path, tokenizer, data):
    odd = "a\x1b[2J\x07b\tc\nd\r\x9be\u202ef 👩\u200d🚀"
    file = write(tmp_path / "a.jsonl", [{"text": odd}, {"text": 3, odd: 4}, {odd: 1}])
    _, text = printed([file], tokenizer, data, kind="text")
    assert "a\\x1b[2J\\x07b" in text and "c\nd\\r\\x9be\\u202ef 👩\u200d🚀" in text.replace("\\x0d", "\\r")
    assert not [c for c in "\x1b\x07\r\x9b\u202e" if c in text]
    with pytest.raises(UserError) as caught:
        detect_kind([write(tmp_path / "b.jsonl", [{odd: 1}])])
    assert "\x1b" not in str(caught.value) and "\\x1b" in str(caught.value)


def test_printable_leaves_ordinary_text_alone():
    text = "tab\t, line\n, 中文, عربي, é, 👩\u200d🚀, \\x1b"
    assert printable(text) == text


def test_millions_fit_80_columns():
    console = Console(file=io.StringIO(), width=80)
    _print_lengths(console, np.array([1_234_567, 9_876_543]))
    count = 1_400_000
    placed, empty = np.arange(400_000), np.zeros(400_000, np.int32)
    plan = PackingPlan(512, np.zeros(count + 1, np.int64), placed, empty, empty, 1_234_567, 1_234_568, 123_456_789)
    cache = mock.MagicMock(kind="conversation", __len__=lambda cache: count)
    _print_packings(console, Inspection(cache, {"best_fit": plan}), 512)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for number in ("1,234,567", "9,876,543", "1,400,000", "400,000", "1,000,000", "1,234,568", "123,456,789"):
        assert number in words, f"{number} is broken across lines"
    assert "tokens of a record, percentiles\n" in text


def test_pairs_are_shown_with_their_trained_answers(tmp_path, tokenizer, capsys):
    prompt = {"role": "user", "content": "q"}
    sides = [[prompt, {"role": "assistant", "content": text}] for text in ("good", "bad")]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(dict(zip(("chosen", "rejected"), sides, strict=True))) + "\n")
    data = DataConfig(seq_len=256, cache_dir=str(tmp_path), system_prompt_probability=0.0)
    found = inspect([file], tokenizer, data)
    told = capsys.readouterr().out
    assert found.cache.kind == "preference" and list(found.packings) == ["pairs"]
    assert told.count("⟦") == 3 and "good" in told and "bad" in told
