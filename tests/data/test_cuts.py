"""Documents longer than a row: what is cut or left out, that it is told, and that nothing untrained is in a plan."""

import json

import numpy as np
import pytest
from slow_rows import pieces_of

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.batches import open_data
from minimind_jax.data.epoch import describe_cuts
from minimind_jax.data.labels import Classes
from minimind_jax.data.packing import Order, plan_best_fit, plan_concat, plan_pairs, plan_whole, split_at_turns
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError
from minimind_jax.training.packed import describe_data

WORDS = "the cat sat on a mat while dogs run"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([WORDS] * 5, tmp_path_factory.mktemp("tokenizer"), 320)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def talk(words, answer="a mat"):
    return [{"role": "user", "content": " cat" * words}, {"role": "assistant", "content": answer}]


def make(folder, tokenizer, kind, records, packing="best_fit", val=None, classes=None, seq_len=64, **changes):
    """(training, validation) batches of these records."""

    def write(name, records):
        file = folder / f"{name}{abs(hash(json.dumps(records)))}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return (str(file),)

    data = DataConfig(
        **{"train": write("train", records), "val": write("val", val) if val else (), "val_fraction": 0.0},
        **{"seq_len": seq_len, "packing": packing, "cache_dir": str(folder / "cache"), "tokenizer_workers": 1},
        **{"system_prompt_probability": 0.0, **changes},
    )
    config = PretrainConfig(data=data, training=TrainingConfig(batch_tokens=4 * seq_len))
    return open_data(kind, config, tokenizer, classes=classes)


def chats(*lengths):
    return [{"conversations": talk(words)} for words in lengths]


def rows(batches):
    """All rows of an epoch that hold anything."""
    steps = list(batches.iterate(0, batches.steps_per_epoch))
    found = [{name: array[row] for name, array in step.items()} for step in steps for row in range(len(step["tokens"]))]
    return [row for row in found if row["segment_ids"].any()]


def test_conversations_without_an_answer_in_the_row_are_refused_with_the_length_that_holds_them(folder, tokenizer):
    with pytest.raises(
        UserError, match=r"training data: nothing is trained in any of 24 conversations.*data.seq_len 144 "
    ):
        make(folder, tokenizer, "conversation", chats(*[100] * 24), "pad")
    with pytest.raises(UserError, match=r"validation data: nothing is trained in any of 3 conversations"):
        make(folder, tokenizer, "conversation", chats(5, 6), "pad", val=chats(100, 101, 102))


@pytest.mark.parametrize("packing", ["pad", "best_fit", "concat"])
def test_every_row_trains_something_and_what_is_left_out_is_told(folder, tokenizer, packing):
    batches, _ = make(folder, tokenizer, "conversation", chats(*[300] * 6, *[9] * 6), packing)
    assert rows(batches) and all(row["loss_weights"].any() for row in rows(batches))
    told = describe_data(batches)
    assert "left out in which nothing is trained" in told and "tokens (" in told and "full" not in told
    if packing == "pad":
        assert batches.plan.rows == 6 and "6 of 12 conversations are longer than data.seq_len 64" in told
    else:  # no answer is lost
        cache = batches.cache
        assert sum(row["loss_weights"].sum() for row in rows(batches)) == cache.info["trained_tokens"]


@pytest.mark.parametrize("packing", ["pad", "best_fit", "concat"])
def test_data_that_fits_is_planned_as_before_and_nothing_is_told(folder, tokenizer, packing):
    batches, _ = make(folder, tokenizer, "conversation", chats(*[9] * 30), packing, seq_len=512)
    plan, lengths = batches.plan, batches.cache.lengths
    if packing == "best_fit":
        without = plan_best_fit(lengths, batches.cache.turns, 512, Order(batches.seed, 0))
    elif packing == "concat":
        without = plan_concat(lengths, 512, Order(batches.seed, 0))
    if packing != "pad":
        assert [pieces_of(plan, r) for r in range(plan.rows)] == [pieces_of(without, r) for r in range(without.rows)]
    assert not plan.dropped_tokens and not plan.untrained
    if packing != "concat":
        assert describe_cuts(batches.epoch(0)) == "" and "packed" in describe_data(batches)


@pytest.mark.parametrize("words", range(30, 75, 3))
def test_a_piece_of_a_conversation_never_begins_inside_a_header(folder, tokenizer, words):
    """Neither of the system prompt, the user nor the assistant, nor of a second turn."""
    system = [{"role": "system", "content": " dogs" * words}]
    batches, _ = make(folder, tokenizer, "conversation", [{"conversations": [*system, *talk(words), *talk(words)]}])
    cache, plan = batches.cache, batches.plan
    ids = cache.ids(0, 0, int(cache.lengths[0]))
    header = len(tokenizer.encode("<|im_start|>assistant\n"))
    for begin in plan.starts[plan.starts > 0]:
        opener = np.flatnonzero(ids[:begin] == ids[0])
        assert ids[begin] == ids[0] or begin - opener[-1] >= header
    assert "begin without the system prompt, the tools" in describe_cuts(batches.epoch(0))


def test_a_header_is_not_cut_even_where_little_is_left_of_the_row():
    bounds, inside = split_at_turns(100, np.array([0]), 40, np.array([0, 37, 76]))
    assert bounds.tolist() == [0, 37, 76, 100] and inside == 2
    bounds, _ = split_at_turns(30, np.array([0]), 8, np.array([0, 5]))  # rows shorter than a header still go on
    assert bounds.tolist() == [0, 5, 13, 21, 29, 30]


def pair(words, chosen, rejected):
    prompt = talk(words)[:1]
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def say(text):
    return [{"role": "assistant", "content": text}]


def test_pairs_keep_their_headers_whole_and_those_without_room_are_left_out(folder, tokenizer):
    records = [
        *[pair(n, say("a mat"), say("dogs")) for n in range(30, 60)],
        pair(2, say("a mat" * 60), say("dogs")),
    ]
    batches, _ = make(folder, tokenizer, "preference", records, seq_len=80)
    cache, plan = batches.cache, batches.plan
    assert plan.left_out == 1
    header = len(tokenizer.encode("<|im_start|>assistant\n"))
    cut = 0
    for document, start in zip(plan.documents[::2], plan.starts[::2], strict=True):
        ids, prompt = cache.ids(document, 0, int(cache.lengths[document])), cache.turns(document)[1]
        cut += start > 0
        assert start <= prompt - header
        assert start == 0 or ids[start] == ids[0] or start - np.flatnonzero(ids[:start] == ids[0])[-1] >= header
    assert cut == plan.cut_documents > 5
    assert "1 pairs left out whose answers have no room" in describe_cuts(batches.epoch(0))


def test_cut_texts_of_a_classifier_and_of_pad_are_told(folder, tokenizer):
    records = [{"text": " cat" * n, "label": "a" if n % 2 else "b"} for n in range(60, 100)]
    batches, _ = make(folder, tokenizer, "labelled", records, classes=Classes(("a", "b")))
    told = describe_data(batches)
    assert "35 of 40 texts are longer than data.seq_len 64: their ends are cut off" in told and "full" not in told
    assert "data.seq_len 112 holds all of them whole" in told
    batches, _ = make(folder, tokenizer, "text", [{"text": r["text"]} for r in records], "pad")
    assert "40 texts" not in describe_data(batches)
    assert "documents are longer than data.seq_len 64: their ends are cut off" in describe_data(batches)


def test_a_redrawn_epoch_says_what_is_cut_of_it(folder, tokenizer, capsys):
    changes = {"redraw_each_epoch": True, "system_prompt_probability": 0.5}
    batches, _ = make(folder, tokenizer, "conversation", chats(*[60] * 8), **changes)
    batches.epoch(1)
    assert "training data of epoch 2: " in (said := capsys.readouterr().out) and "cut between turns" in said


def test_without_a_shuffle_every_plan_keeps_the_order_of_the_data():
    lengths = np.random.default_rng(0).integers(2, 40, 50)
    for plan in (
        plan_best_fit(lengths, lambda d: np.zeros(1, int), 32, Order(0, 0, shuffle=False)),
        plan_whole(lengths, 32, Order(0, 0, shuffle=False)),
        plan_pairs(2 * lengths, lambda d: np.array([0, 1, lengths[d]]), 80, Order(0, 0, shuffle=False)),
    ):
        assert (np.diff(plan.documents) >= 0).all() and len(np.unique(plan.documents)) == 50
        assert all(sum(b - a for _, a, b in pieces_of(plan, row)) <= plan.seq_len for row in range(plan.rows))
