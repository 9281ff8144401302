"""Batches: rows against the documents they are made of, resuming, loader threads, processes, epochs, validation."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
from slow_rows import rows_of

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig, SFTConfig
from minimind_jax.data.batches import READ_AHEAD, Batches, open_data, split_records
from minimind_jax.data.documents import encode_text
from minimind_jax.data.rows import Pieces, pad_rows
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.plan.compile import abstract_batch

SEQ_LEN = 32
RNG = np.random.default_rng(0)
TEXTS = [
    " ".join(RNG.choice(["the", "cat", "ox", "eats", "麦子", "and", "sleeps"], size=n)) for n in RNG.integers(1, 60, 50)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=330)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": text} for text in TEXTS]
    talks = [
        {
            "conversations": [
                {"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, talk, strict=False)
            ]
        }
        for talk in (TEXTS[i : i + 2 + 2 * (i % 3)] for i in range(0, 44))
    ]
    for name, records in (("texts", texts), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(cache_dir=str(folder / "cache"), seq_len=SEQ_LEN, tokenizer_workers=1, loader_workers=0)


@pytest.fixture(scope="module")
def text_cache(folder, tokenizer, config):
    return build_cache("text", [folder / "texts.jsonl"], tokenizer, config, seed=1)


@pytest.fixture(scope="module")
def talk_cache(folder, tokenizer, config):
    return build_cache("conversation", [folder / "talks.jsonl"], tokenizer, config, seed=1)


@pytest.fixture
def make(config, tokenizer):
    def make(cache, rows_per_step=4, seed=1, process=(0, 1), select=None, redraw=None, **changes):
        data = dataclasses.replace(config, **changes)
        token_bytes = tokenizer.token_bytes()
        return Batches(cache, data, rows_per_step, seed, token_bytes, *process, select=select, redraw=redraw)

    return make


PACKINGS = ("concat", "best_fit", "pad")


def take(batches, start, steps):
    return list(batches.iterate(start, steps))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def segments(batches, steps):
    """Every piece in the batches: a dict of its arrays, without padding."""
    for batch in take(batches, 0, steps):
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for segment in range(1, ids.max() + 1):
                yield {name: array[row][ids == segment] for name, array in batch.items()}


@pytest.mark.parametrize(("kind", "packing"), [*itertools.product(["text", "conversation"], ["concat", "best_fit"])])
def test_packed_rows_hold_every_document_with_all_its_targets(text_cache, talk_cache, make, tokenizer, kind, packing):
    cache = text_cache if kind == "text" else talk_cache
    batches = make(cache, packing=packing, seq_len=32 if kind == "text" else 240)
    left = {}  # first tokens -> documents not seen yet; pieces of a document follow each other by their last target
    for document, length in enumerate(cache.lengths):
        ids = cache.ids(document, 0, int(length))
        left.setdefault(ids.tobytes(), []).append((ids, cache.is_trained(document, 0, int(length))))
    pieces = list(segments(batches, batches.steps_per_epoch))
    assert sum(len(piece["tokens"]) for piece in pieces) == cache.lengths.sum()
    assert sum(piece["loss_weights"].sum() for piece in pieces) == sum(
        trained[1:].sum() for documents in left.values() for _, trained in documents
    )
    whole = [piece for piece in pieces if piece["tokens"].tobytes() in left]
    assert len(whole) > 10
    token_bytes = tokenizer.token_bytes()
    for piece in whole:
        ids, trained = left[piece["tokens"].tobytes()][0]
        np.testing.assert_array_equal(piece["targets"][:-1], ids[1:])
        np.testing.assert_array_equal(piece["loss_weights"][:-1], trained[1:])
        assert piece["loss_weights"][-1] == 0
        np.testing.assert_array_equal(piece["positions"], np.arange(len(ids)))
        np.testing.assert_array_equal(piece["target_bytes"][:-1], token_bytes[ids[1:]] * trained[1:])
    cut = [piece for piece in pieces if piece["tokens"].tobytes() not in left]
    assert cut and all(piece["positions"][0] == 0 for piece in cut)
    continued = {piece["tokens"][0] for piece in cut}
    for piece in cut:
        np.testing.assert_array_equal(piece["targets"][:-1], piece["tokens"][1:])
        ends = piece["tokens"][-1] == tokenizer.eos_id if kind == "text" else piece["loss_weights"][-1] == 0
        assert ends or piece["targets"][-1] in continued


def test_concat_rows_in_order_are_the_joined_documents(text_cache, make):
    batches = make(text_cache, packing="concat", shuffle=False)
    rows = np.concatenate([batch["tokens"] for batch in take(batches, 0, batches.steps_per_epoch)])
    targets = np.concatenate([batch["targets"] for batch in take(batches, 0, batches.steps_per_epoch)])
    weights = np.concatenate([batch["loss_weights"] for batch in take(batches, 0, batches.steps_per_epoch)])
    joined = text_cache.tokens.astype(int)
    np.testing.assert_array_equal(rows.ravel()[: len(joined)], joined)
    last_of_document = np.isin(np.arange(len(joined)), text_cache.offsets[1:] - 1)
    np.testing.assert_array_equal(weights.ravel()[: len(joined)], ~last_of_document)
    np.testing.assert_array_equal(
        targets.ravel()[: len(joined) - 1][~last_of_document[:-1]], joined[1:][~last_of_document[:-1]]
    )
    assert not weights.ravel()[len(joined) :].any()


def test_target_bytes_of_a_text_are_its_bytes(text_cache, make):
    batches = make(text_cache, packing="concat")
    total = sum(batch["target_bytes"].sum() for batch in batches.iterate(0, batches.steps_per_epoch))
    assert total == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(
    ("kind", "packing", "seq_len"),
    [*itertools.product(["text"], PACKINGS, [4, 32, 240]), *itertools.product(["conversation"], PACKINGS, [100, 240])],
)
def test_the_rows_of_a_step_are_those_built_one_by_one(text_cache, talk_cache, make, kind, packing, seq_len):
    """Bit for bit, with padding rows at the end, whatever the documents and the number of rows."""
    cache = text_cache if kind == "text" else talk_cache
    batches = make(cache, 3, packing=packing, seq_len=seq_len, select=lambda cache: np.arange(len(cache))[::2])
    for step, batch in enumerate(take(batches, 0, min(batches.steps_per_epoch + 2, 40))):
        epoch, within = batches.locate(step)
        expected = rows_of(batches.epoch(epoch), range(3 * within, 3 * within + 3), batches.token_bytes)
        assert_same([batch], [expected])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_planned_step_has_the_arrays_of_a_real_one(text_cache, make, packing):
    data = DataConfig(packing=packing, seq_len=SEQ_LEN)
    planned = abstract_batch(PretrainConfig(data=data, training=TrainingConfig(batch_tokens=4 * SEQ_LEN)))
    (real,) = take(make(text_cache, packing=packing, seq_len=SEQ_LEN), 0, 1)
    assert {name: (x.shape, x.dtype) for name, x in planned.items()} == {
        name: (x.shape, x.dtype) for name, x in real.items()
    }


def pad_row(cache, document, tokenizer, end_id=None):
    one = [np.array([value]) for value in (0, 0, document, 0, min(int(cache.lengths[document]), SEQ_LEN))]
    rows = pad_rows(cache, Pieces(1, SEQ_LEN, *one), tokenizer.token_bytes(), end_id)
    return {name: array[0] for name, array in rows.items()}


def test_pad_rows_of_text_are_minimind_s(text_cache, tokenizer, make):
    for document, text in enumerate(TEXTS):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)[: SEQ_LEN - 2], tokenizer.eos_id]
        padded = np.array(ids + [tokenizer.pad_id] * (SEQ_LEN - len(ids)))
        row = pad_row(text_cache, document, tokenizer, tokenizer.eos_id)
        np.testing.assert_array_equal(row["tokens"], padded)
        np.testing.assert_array_equal(row["targets"][: len(ids) - 1], padded[1 : len(ids)])
        np.testing.assert_array_equal(row["loss_weights"], np.arange(SEQ_LEN) < len(ids) - 1)
        np.testing.assert_array_equal(row["segment_ids"], np.arange(SEQ_LEN) < len(ids))
        kept = row["targets"][: len(ids) - 1]
        assert row["target_bytes"].sum() == tokenizer.token_bytes()[kept].sum()
    assert max(len(tokenizer.encode(text)) for text in TEXTS) > SEQ_LEN  # some were cut
    batches = make(text_cache, packing="pad", shuffle=False)
    rows = np.concatenate([batch["tokens"] for batch in take(batches, 0, batches.steps_per_epoch)])
    expected = [pad_row(text_cache, d, tokenizer, tokenizer.eos_id)["tokens"] for d in range(len(TEXTS))]
    np.testing.assert_array_equal(rows[: len(TEXTS)], expected)


def test_pad_rows_of_conversations_are_their_first_tokens(talk_cache, tokenizer):
    for document, length in enumerate(talk_cache.lengths):
        ids = talk_cache.ids(document, 0, SEQ_LEN)
        labels = np.where(talk_cache.is_trained(document, 0, SEQ_LEN), ids, -100)
        row = pad_row(talk_cache, document, tokenizer)
        n = min(int(length), SEQ_LEN)
        np.testing.assert_array_equal(row["tokens"][:n], ids)
        np.testing.assert_array_equal(
            np.where(row["loss_weights"][: n - 1] > 0, row["targets"][: n - 1], -100), labels[1:]
        )
        assert not row["loss_weights"][n - 1 :].any()


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_every_row_of_an_epoch_comes_once_and_padding_fills_the_last_step(text_cache, make, packing):
    batches = make(text_cache, packing=packing, rows_per_step=7)
    assert batches.plan.rows % 7
    for epoch in range(2):
        epoch_batches = take(batches, epoch * batches.steps_per_epoch, batches.steps_per_epoch)
        used = np.concatenate([batch["segment_ids"][:, 0] > 0 for batch in epoch_batches])
        np.testing.assert_array_equal(used, np.arange(len(used)) < batches.plan.rows)
        trained = sum(batch["loss_weights"].sum() for batch in epoch_batches)
        if packing != "pad":
            assert trained == text_cache.info["trained_tokens"] == batches.trained_tokens_per_epoch


def test_epochs_differ_and_seeds_differ(text_cache, make):
    batches = make(text_cache)
    steps = batches.steps_per_epoch
    tokens = [np.concatenate([b["tokens"] for b in take(batches, e * steps, steps)]).tolist() for e in (0, 1)]
    other = np.concatenate([b["tokens"] for b in take(make(text_cache, seed=2), 0, steps)]).tolist()
    assert tokens[0] != tokens[1] and tokens[0] != other


@pytest.mark.parametrize(("packing", "threads"), [*itertools.product(PACKINGS, [0, 2])])
def test_starting_at_any_step_equals_a_straight_run(text_cache, make, packing, threads):
    straight = take(make(text_cache, packing=packing), 0, 40)
    assert make(text_cache, packing=packing).steps_per_epoch < 20  # several epochs
    for start in (0, 1, 7, 19, 20, 39):
        resumed = take(make(text_cache, packing=packing, loader_workers=threads), start, 40 - start)
        assert_same(resumed, straight[start:])
    assert take(make(text_cache), 5, 0) == []


def test_a_late_step_is_reached_without_replaying(talk_cache, make):
    batches = make(talk_cache)
    step = 10**6
    (batch,) = take(batches, step, 1)
    epoch, within = divmod(step, batches.steps_per_epoch)
    rows = batches.epoch(epoch).rows([within * 4], batches.token_bytes)
    np.testing.assert_array_equal(batch["tokens"][0], rows["tokens"][0])


def test_loader_threads_do_not_change_the_batches(talk_cache, make):
    runs = [take(make(talk_cache, packing="best_fit", loader_workers=n), 3, 25) for n in (0, 1, 4)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_the_processes_make_up_each_step(talk_cache, make, processes):
    whole = take(make(talk_cache), 2, 9)
    parts = [take(make(talk_cache, process=(p, processes)), 2, 9) for p in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    evaluation = [list(make(talk_cache, process=(p, processes)).eval_batches(6)) for p in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*evaluation, strict=True)
    ]
    assert_same(joined, list(make(talk_cache).eval_batches(6)))


def test_evaluation_has_a_fixed_order_and_number_of_rows(talk_cache, make):
    batches = make(talk_cache)
    first = list(batches.eval_batches(6))
    take(batches, 0, 30)
    assert_same(first, list(batches.eval_batches(6)))
    assert_same(first, list(make(talk_cache, seed=9).eval_batches(6)))
    assert [int((b["segment_ids"].max(axis=1) > 0).sum()) for b in first] == [4, 2]
    everything = list(batches.eval_batches(0))
    assert sum(b["loss_weights"].sum() for b in everything) == talk_cache.info["trained_tokens"]


def test_redrawing_gives_each_epoch_a_cache_of_its_own(folder, tokenizer, config):
    data = dataclasses.replace(
        config,
        train=(str(folder / "talks.jsonl"),),
        val_fraction=0.2,
        packing="best_fit",
        redraw_each_epoch=True,
        system_prompt_probability=0.5,
    )
    settings = SFTConfig(data=data, training=TrainingConfig(batch_tokens=4 * SEQ_LEN))
    train, val = open_data("conversation", settings, tokenizer)
    epochs = [train.epoch(e) for e in range(3)]
    assert len({epoch.cache.folder for epoch in epochs}) == 3
    held_out = set(val.epoch(0).cache.records[val.epoch(0).documents].tolist())
    for epoch in epochs:  # the split is by record, so no epoch trains on a held-out one
        assert not held_out & set(epoch.cache.records[epoch.documents].tolist())
    starts = np.cumsum([0, *(-(-epoch.plan.rows // 4) for epoch in epochs)])
    assert [train.locate(int(step)) for step in starts] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    straight = take(train, 0, int(starts[3]))
    for e, epoch in enumerate(epochs):
        trained = sum(b["loss_weights"].sum() for b in straight[starts[e] : starts[e + 1]])
        cache = epoch.cache
        assert trained == sum(cache.is_trained(d, 0, cache.lengths[d]).sum() for d in epoch.documents)
    again, _ = open_data("conversation", settings, tokenizer)
    assert_same(take(again, int(starts[1]) + 1, 5), straight[starts[1] + 1 : starts[1] + 6])


@pytest.mark.parametrize("threads", [0, 1])
def test_a_redrawn_epoch_is_made_while_the_one_before_is_read(talk_cache, make, threads):
    """Once only, and no epoch that the run does not reach."""
    made, calls = threading.Event(), []

    def redraw(epoch, ahead):
        calls.append((epoch, ahead))
        made.set()
        return talk_cache

    batches = make(talk_cache, redraw=redraw, loader_workers=threads)
    steps = batches.steps_per_epoch
    assert steps > 2 * READ_AHEAD
    reader = batches.iterate(0, 2 * steps)
    read = [next(reader)]
    assert made.wait(10) and calls == [(1, True)]
    assert_same([*read, *reader], take(make(talk_cache), 0, 2 * steps))
    assert calls == [(1, True)]


def test_what_is_wrong_with_a_redrawn_epoch_is_told_where_it_begins(talk_cache, make):
    def redraw(epoch, ahead):
        raise UserError("a data file changed")

    batches = make(talk_cache, redraw=redraw)
    reader = batches.iterate(0, 2 * batches.steps_per_epoch)
    for _ in range(batches.steps_per_epoch):
        next(reader)
    with pytest.raises(UserError, match="a data file changed"):
        next(reader)


def test_the_split_depends_on_record_numbers_alone(folder, tokenizer, config, text_cache):
    train, held_out = split_records(text_cache.records, 0.3, seed=4)
    assert sorted([*train, *held_out]) == list(range(len(TEXTS)))
    assert 5 < len(held_out) < 25
    assert split_records(text_cache.records, 0.3, seed=5)[1].tolist() != held_out.tolist()
    longer = folder / "longer.jsonl"
    broken = (folder / "texts.jsonl").read_text(encoding="utf-8").replace('{"text": ', '{"words": ', 1)
    longer.write_text(broken + '\n{"text": "one more"}', encoding="utf-8")
    cache = build_cache("text", [longer], tokenizer, dataclasses.replace(config, on_error="skip"), seed=1)
    grown = set(cache.records[split_records(cache.records, 0.3, seed=4)[1]].tolist())
    assert grown - {len(TEXTS)} == set(held_out.tolist()) - {0}


def test_a_small_fraction_holds_out_at_least_one_document(text_cache):
    train, held_out = split_records(text_cache.records, 1e-9, seed=4)
    assert (len(train), len(held_out)) == (len(TEXTS) - 1, 1)
    assert len(split_records(text_cache.records, 0.0, seed=4)[1]) == 0


def test_open_data_makes_training_and_validation(folder, tokenizer, config):
    def opened(**changes):
        data = dataclasses.replace(config, train=(str(folder / "texts.jsonl"),), **changes)
        return open_data(
            "text", PretrainConfig(data=data, training=TrainingConfig(batch_tokens=4 * SEQ_LEN)), tokenizer
        )

    train, val = opened(val_fraction=0.2)
    assert train.rows_per_step == 4
    both = [*train.epoch(0).documents.tolist(), *val.epoch(0).documents.tolist()]
    assert sorted(both) == list(range(len(TEXTS)))
    assert opened(val_fraction=0.0)[1] is None
    val_file = folder / "val.jsonl"
    val_file.write_text('{"text": "a cat"}\n')
    train, val = opened(val=(str(val_file),))
    assert len(train.epoch(0).documents) == len(TEXTS)
    ids = encode_text(tokenizer, "a cat").ids
    (batch,) = val.eval_batches(10)
    np.testing.assert_array_equal(batch["tokens"][0][: len(ids)], ids)
    with pytest.raises(UserError, match="no document is left to train on"):
        opened(val_fraction=1.0)


def test_large_vocabularies_are_stored_whole(folder, tokenizer, config, tmp_path):
    wide = tmp_path / "wide"
    tokenizer.save(wide)
    content = json.loads((wide / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 70_000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70_000
    (wide / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "far.jsonl").write_text('{"text": "the <far> cat"}\n')
    cache = build_cache("text", [tmp_path / "far.jsonl"], Tokenizer.load(wide), config, seed=1)
    assert cache.tokens.dtype == np.uint32 and 70_000 in cache.ids(0, 0, 100)


@pytest.mark.parametrize("count", [1500, pytest.param(None, marks=pytest.mark.slow)])
def test_real_conversations_pack_to_97_percent_and_none_is_lost(shared_dir, tmp_path, count):
    tokenizer = Tokenizer.load(shared_dir / "data" / "minimind-tokenizer")
    part = tmp_path / "sft.jsonl"
    with (shared_dir / "data" / "sft.jsonl").open(encoding="utf-8") as stream:
        lines = list(itertools.islice(stream, count))
    part.write_text("".join(lines), encoding="utf-8")
    data = DataConfig(cache_dir=str(tmp_path / "cache"), seq_len=1024, packing="best_fit")
    cache = build_cache("conversation", [part], tokenizer, data, seed=42)
    batches = Batches(cache, data, 8, 42, tokenizer.token_bytes())
    assert batches.plan.efficiency >= 0.97
    placed = sum(batch["loss_weights"].sum() for batch in batches.iterate(0, batches.steps_per_epoch))
    assert len(cache) == len(lines) and placed == cache.info["trained_tokens"]
