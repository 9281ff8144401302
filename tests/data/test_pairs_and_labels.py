"""Pairs of answers and labelled texts: parsing, encoding, packing, and what a row is given beside its tokens."""

import json
from collections import Counter

import numpy as np
import pytest
from slow_rows import pieces_of, rows_of

from minimind_jax.config.classify import ClassifyConfig, LabelConfig
from minimind_jax.config.sections import DataConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.documents import encode_conversation, encode_preference
from minimind_jax.data.jsonl import Record, iter_records
from minimind_jax.data.kinds import parse_preference
from minimind_jax.data.labels import Classes, find_classes, parse_labelled
from minimind_jax.data.packing import Order, plan_pairs, plan_whole
from minimind_jax.data.template import Dice
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError

USER = {"role": "user", "content": "what does the cat do"}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["the cat sat on a mat while dogs run"] * 5, tmp_path_factory.mktemp("tokenizer"), 320)


def record(value):
    return Record("pairs.jsonl:1", None, 1, value)


def test_a_pair_is_encoded_as_its_two_conversations(tokenizer):
    history = [USER, answer("it sat"), USER]
    preference = parse_preference(
        record({"chosen": [*history, answer("a mat")], "rejected": [*history, answer("dogs run")]})
    )
    document = encode_preference(tokenizer, preference)
    sides = [encode_conversation(tokenizer, side) for side in (preference.chosen, preference.rejected)]
    np.testing.assert_array_equal(document.ids, np.concatenate([side.ids for side in sides]))
    start, prompt, middle = document.turn_starts
    assert (start, middle) == (0, len(sides[0].ids))
    for first, side in zip((0, middle), sides, strict=True):
        trained = document.trained[first : first + len(side.ids)]
        assert not trained[:prompt].any()  # the answer in the history is the same on both sides
        np.testing.assert_array_equal(trained[prompt:], side.trained[prompt:])
        assert trained.any()


@pytest.mark.parametrize("form", ["messages", "text"])
def test_a_prompt_of_its_own_stands_before_both_sides(form):
    """TRL's usual form."""
    whole = parse_preference(record({"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}))
    if form == "messages":
        value = {"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}
    else:
        value = {"prompt": USER["content"], "chosen": "a", "rejected": "b"}
    assert parse_preference(record(value)) == whole
    with pytest.raises(UserError, match="no question in common"):
        parse_preference(record({"chosen": [answer("a")], "rejected": [answer("b")]}))


def test_both_sides_of_a_pair_get_the_same_draws(tokenizer):
    """MiniMind draws for each side by itself, and 32 % of its pairs differ by an empty think block."""
    preference = parse_preference(record({"chosen": [USER, answer("a mat")], "rejected": [USER, answer("dogs")]}))
    empty = tokenizer.encode("<think>\n\n</think>\n\n")
    seen = set()
    for number in range(40):
        document = encode_preference(tokenizer, preference, Dice(0, 0, 0.3, 0.5).roll(number))
        middle = document.turn_starts[2]
        sides = [document.ids[:middle].tolist(), document.ids[middle:].tolist()]
        has_block = [any(ids[i : i + len(empty)] == empty for i in range(len(ids))) for ids in sides]
        prompt = document.turn_starts[1]
        assert has_block[0] == has_block[1] and sides[0][:prompt] == sides[1][:prompt]
        seen.add((has_block[0], len(sides[0])))
    assert len(seen) > 4  # with and without block, with and without one of ten system prompts


def pairs_of(*sizes):
    """lengths and bounds of pairs (prompt, chosen answer, rejected answer)."""
    lengths = np.array([2 * p + c + r for p, c, r in sizes])
    return lengths, lambda document: np.array([0, sizes[document][0], sizes[document][0] + sizes[document][1]])


def test_pairs_stay_together_and_long_prompts_lose_their_beginning():
    lengths, bounds = pairs_of((4, 3, 5), (30, 4, 7), (2, 2, 2), (1, 30, 30), (10, 2, 2))
    plan = plan_pairs(lengths, bounds, 32, Order(0, 0))
    assert (plan.left_out, plan.cut_documents) == (1, 1)
    seen = {}
    for row in range(plan.rows):
        pieces = pieces_of(plan, row)
        assert sum(stop - start for _, start, stop in pieces) <= 32 and len(pieces) % 2 == 0
        for (document, start, stop), (other, rejected_start, rejected_stop) in zip(
            pieces[::2], pieces[1::2], strict=True
        ):
            assert document == other
            middle = bounds(document)[2]
            assert stop == middle and rejected_stop == lengths[document]
            assert start == rejected_start - middle < bounds(document)[1]
            seen[document] = start
    assert seen == {0: 0, 1: 20, 2: 0, 4: 0}


def test_long_texts_keep_their_heads():
    plan = plan_whole(np.array([5, 40, 3]), 16, Order(0, 0))
    assert plan.cut_documents == 1 and plan.dropped_tokens == 24
    pieces = sorted(piece for row in range(plan.rows) for piece in pieces_of(plan, row))
    assert pieces == [(0, 0, 5), (1, 0, 16), (2, 0, 3)]


def test_a_row_of_pairs(tokenizer, tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [{"chosen": [USER, answer("a mat")], "rejected": [USER, answer("dogs run")], "margin": n} for n in range(5)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = DataConfig(train=(str(file),), seq_len=160, cache_dir=str(tmp_path), system_prompt_probability=0.0)
    cache = build_cache("preference", data.train, tokenizer, data, seed=0)
    np.testing.assert_array_equal(cache.values, np.arange(5)[:, None])

    def annotate(cache, pieces):
        found = np.full((pieces.row_count, 8), -1)
        found[pieces.rows, pieces.segments] = pieces.documents
        return {"documents": found}

    batches = Batches(cache, data, 1, 0, tokenizer.token_bytes(), annotate=annotate)
    row = {name: array[0] for name, array in next(batches.iterate(0, 1)).items()}
    count = int(row["segment_ids"].max())
    documents = row["documents"][:count]
    np.testing.assert_array_equal(documents[::2], documents[1::2])
    for segment in range(1, count + 1):
        here = row["segment_ids"] == segment
        np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
        assert row["loss_weights"][here].sum() >= 2  # an answer and its end
        assert row["loss_weights"][here][-1] == 0  # nothing predicts the other side's first token


@pytest.mark.parametrize("kind", ["preference", "labelled"])
def test_the_rows_of_a_step_are_those_built_one_by_one(tokenizer, tmp_path, kind):
    words = [" cat" * (7 * number % 50) + " mat" for number in range(40)]
    records = {
        "preference": [{"chosen": [USER, answer("a" + w)], "rejected": [USER, answer("dogs")]} for w in words],
        "labelled": [{"text": w, "label": "a"} for w in words],
    }[kind]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = DataConfig(train=(str(file),), seq_len=100, cache_dir=str(tmp_path), system_prompt_probability=0.0)
    cache = build_cache(kind, data.train, tokenizer, data, seed=0, classes=Classes(("a", "b")))
    batches = Batches(cache, data, 3, 0, tokenizer.token_bytes())
    for step, batch in enumerate(batches.iterate(0, batches.steps_per_epoch)):
        expected = rows_of(batches.epoch(0), range(3 * step, 3 * step + 3), batches.token_bytes)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype


def test_labels_are_counted_from_their_names(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text('text,label\n"one, two",b\nthree,a\n"four ""five""",b\n', "utf-8-sig")
    classes = find_classes([file], "text", "label")
    assert classes == Classes(("a", "b"))
    records = [parse_labelled(each, classes) for each in iter_records([file])]
    assert [each.text for each in records] == ["one, two", "three", 'four "five"']
    assert [classes.values(each.labels) for each in records] == [(1.0,), (0.0,), (1.0,)]


def test_labelled_texts_under_other_names(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("body;Sprache;label\none;de;a\ntwo;en;b\n", "latin-1")
    classes = find_classes([file], "text", "label")
    records = list(iter_records([file], told=(told := Counter())))
    assert [parse_labelled(each, classes)[:2] for each in records] == [("one", ("a",)), ("two", ("b",))]
    assert told == {(str(file), "`Sprache` is ignored"): 2}
    classes = find_classes([file], "Sprache", "label")
    assert parse_labelled(records[0], classes).text == "de"


@pytest.mark.parametrize(("shared", "own", "read"), [("", "text", "text"), ("a", "text", "a"), ("", "b", "b")])
def test_two_settings_name_the_text(shared, own, read):
    classify = LabelConfig(text_field=own)
    assert ClassifyConfig(data=DataConfig(text_field=shared), classify=classify).text_field == read
    if own == "b":
        with pytest.raises(ValueError, match=r"classify\.text_field is b and data\.text_field a"):
            ClassifyConfig(data=DataConfig(text_field="a"), classify=classify)


def test_labels_that_are_numbers_are_sorted_as_such(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (10, 2.0, 1, "-3")))
    assert find_classes([file], "text", "label").names == ("-3", "1", "2", "10")


def test_lists_of_labels_make_several(tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(
        '{"text": "x", "label": "a"}\n{"text": "y", "label": ["b", "a", "b"]}\n{"text": "z", "label": []}\n'
    )
    classes = find_classes([file], "text", "label")
    assert classes_of(tmp_path, {"label": [0]}, {"label": [1, 0]})[1] == [
        (1.0, 0.0),
        (1.0, 1.0),
    ]  # numbers, no yes and no
    assert classes.several and classes.names == ("a", "b")
    found = [classes.values(parse_labelled(each, classes).labels) for each in iter_records([file])]
    assert found == [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]


def classes_of(tmp_path, *records, told=None, field="label"):
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({"text": "x", **each}, ensure_ascii=False) + "\n" for each in records), "utf-8")
    told = [] if told is None else told
    classes = find_classes([file], "text", field, tell=told.append)
    return classes, [classes.values(parse_labelled(each, classes).labels) for each in iter_records([file])]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "01", "001", "2"], ("001", "01", "1", "2")),
        (["2", "001", "1", "01"], ("001", "01", "1", "2")),
        (["10.5", "9", "-1", "1.5"], ("-1", "1.5", "9", "10.5")),
        (["b", "10", "9", "--1", "a"], ("9", "10", "--1", "a", "b")),
        ([True, False, "maybe"], ("false", "maybe", "true")),
        (["é", "z", "狗", "Z"], ("Z", "z", "é", "狗")),
    ],
)
def test_labels_have_one_order(labels, expected, tmp_path):
    assert classes_of(tmp_path, *({"label": label} for label in labels))[0].names == expected


def test_lists_in_text_cells_are_lists_of_labels(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text('text,label\nx,"[""fire"", ""late""]"\ny,fire\nz,[]\nw,"[1, true]"\n', "utf-8")
    told = []
    classes = find_classes([file], "text", "label", tell=told.append)
    assert classes.several and classes.names == ("1", "fire", "late", "true")
    assert told == ["3 of 4 records have a list of labels, so every text may have any number of them"]
    found = [parse_labelled(each, classes).labels for each in iter_records([file])]
    assert found == [("fire", "late"), ("fire",), (), ("1", "true")]


@pytest.mark.parametrize("field", ["label", "labels", "category", "intent", "label_text"])
def test_labels_are_found_under_their_usual_names(field, tmp_path):
    told = []
    classes, values = classes_of(tmp_path, {field: "b"}, {field: "a"}, told=told)
    assert classes.names == ("a", "b") and values == [(1.0,), (0.0,)]
    assert told == ([] if field == "label" else [f"labels are read from {field}"])


@pytest.mark.parametrize("beside", ["label_text", "label_name"])
def test_numbers_are_called_what_stands_beside_them(beside, tmp_path):
    classes, values = classes_of(tmp_path, {"label": 1, beside: "good"}, {"label": "0", beside: "bad"})
    assert classes.names == ("bad", "good") and values == [(1.0,), (0.0,)]
    classes, values = classes_of(tmp_path, {"labels": [0, 2], beside: ["c", "a"]}, {"labels": [], beside: []})
    assert classes.names == ("a", "c") and values == [(1.0, 1.0), (0.0, 0.0)]
    named = [{"text": "x", "intent": 0, "intent_name": "buy"}, {"text": "x", "intent": 1, "intent_name": "ask"}]
    assert classes_of(tmp_path, *named, field="intent")[0].names == ("ask", "buy")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"label": 0, "label_text": "a"}, {"label": 0, "label_text": "b"}], ":2: the label 0 is called 'b', .*'a'"),
        ([{"label": 0, "label_text": "a"}, {"label": 1, "label_text": "a"}], ":2: the label 1 is called 'a', .*0 is"),
        ([{"label": 0, "label_text": "a"}, {"label": 1}], ":2: label is a number without a name"),
        ([{"label": 1}, {"label": 0, "label_text": "a"}], ":1: label is a number without a name"),
        ([{"labels": [0, 1], "label_text": ["a"]}], ":1: labels has 2 labels, and label_text 1 names"),
        ([{"label": "a", "labels": ["a", "b"]}], ":1: both label and labels are there"),
        ([{"category": "a", "intent": "b"}], ":1: both category and intent are there"),
        ([{"label": "['fire', 'late']"}], ":1: label is .*no list in JSON"),
        ([{"label": "[urgent]"}], ":1: label is .*no list in JSON"),
        ([{"label": "('fire', 'late')"}], ":1: label is .*no list in JSON"),
        ([{"label": "{'fire', 'late'}"}], ":1: label is .*no list in JSON"),
        ([{"label": "{fire,late}"}], ":1: label is .*no list in JSON"),
        ([{"label": [1, 0, 0]}, {"label": [0, 1, 0]}], "label are 3 times 0 or 1, as if for every label its yes or no"),
        ([{"label": "[0.0, 1.0]"}], "label are 2 times 0 or 1, as if"),
        ([{"labels": [True, False]}], "labels are 2 times false or true, as if"),
        ([{"label": '{"fire": 1}'}], ":1: label is {'fire': 1}"),
        ([{"label": ""}], r":1: label is ''.*\[\]"),
        ([{"label": None}], ":1: label is None"),
        ([{"text": None, "label": "a"}], ":1: text is null; expected a string"),
        ([{"text": 7, "label": "a"}], ":1: text is a number; expected a string"),
        ([{"label": ["a", None]}], ":1: label is None"),
        ([{"label": 1.5}], ":1: label is 1.5"),
        ([{"label": {"name": "a"}}], ":1: label is {"),
        ([{"topic": "a"}], ":1: missing field `label`.*topic"),
    ],
)
def test_labels_that_cannot_be_understood_are_refused(records, message, tmp_path):
    with pytest.raises(UserError, match=message):
        classes_of(tmp_path, *records)


def test_labels_that_look_like_slips_are_told(tmp_path):
    told = []
    names = ["Fire", "fire ", "late", "late", "1", "01", "fire,late", "late; Fire"]
    assert classes_of(tmp_path, *({"label": name} for name in names), told=told)[0].names == (
        *("01", "1", "Fire", "fire", "fire,late", "late", "late; Fire"),
    )
    assert told == [
        "labels that differ only in case, spaces or zeros are classes of their own: '01' x 1, '1' x 1; "
        "'Fire' x 1, 'fire' x 1",
        "2 labels look like several in one and are classes of their own, such as 'fire,late'; a text with several has "
        'a list, in a CSV cell as JSON: ["one", "other"]',
    ]
    told.clear()
    classes_of(tmp_path, {"label": "Yes"}, {"label": "yes\u200b\xa0"}, told=told)
    assert len(told) == 1 and "differ only in case" in told.pop()
    classes_of(tmp_path, {"label": "NaN"}, {"label": "late"}, told=told)
    assert told.pop().startswith("labels that look like missing ones are classes like others: 'NaN' x 1;")
    classes_of(tmp_path, *({"label": number} for number in range(20)), told=told)
    assert told.pop() == "20 labels for 20 texts: is label the right field?"
    classes_of(tmp_path, *({"label": name} for name in ("fire/late", "fire", "late")), told=told)
    assert told.pop().startswith("1 labels look like several in one")
    classes_of(tmp_path, {"label": "Paris, France"}, {"label": "late"}, told=told)
    assert told == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b,c\n", "bad.csv:2: more columns .*double quotes"),
        ("text,label\na\n", "bad.csv:2: fewer columns .*double quotes"),
        ("text,text\na,b\n", "bad.csv:1: the header has the column 'text' twice"),
        ('text,label\n"a,b\n', "bad.csv: not a readable CSV file"),
        ("text,label\n", "the file is empty"),
    ],
)
def test_broken_csv_is_told(content, message, tmp_path):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(iter_records([tmp_path / "bad.csv"]))
