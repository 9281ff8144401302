"""What a checkpoint remembers of the data, and which changes stop a resume."""

import json

import pytest

from minimind_jax.config.sections import DataConfig
from minimind_jax.data.batches import Batches, split_records
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError
from minimind_jax.training.packed import check_same_data, data_record


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["How old is the cat?", "Old."], tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture
def record(tmp_path, tokenizer):
    """The data record of settings, over talks that have a system prompt (so no chance changes their tokens)."""
    talk = [("system", "s"), ("user", "How old is the cat?"), ("assistant", "Old."), ("user", "Why?")]
    lines = {"conversation": [{"conversations": [{"role": r, "content": c} for r, c in talk]}], "text": [{"text": "a"}]}
    for kind, values in lines.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values * 40))

    def make(kind, **settings):
        data = DataConfig(
            **{"cache_dir": str(tmp_path / "cache"), "tokenizer_workers": 1, "seq_len": 64, "packing": "concat",
               "empty_think_removal": 0.0, "val_fraction": 0.0, **settings}
        )  # fmt: skip
        cache = build_cache(kind, [tmp_path / f"{kind}.jsonl"], tokenizer, data, seed=1)
        select = lambda c: split_records(c.records, data.val_fraction, 1)[0]  # noqa: E731
        return data_record(Batches(cache, data, 4, seed=1, token_bytes=tokenizer.token_bytes(), select=select))

    return make


@pytest.mark.parametrize(
    ("name", "value"), [("redraw_each_epoch", True), ("system_prompt_probability", 0.9), ("empty_think_removal", 1e-9)]
)
def test_the_draws_of_later_epochs_are_part_of_the_data_of_conversations(record, name, value):
    before, now = record("conversation"), record("conversation", **{name: value})
    assert before["tokens"] == now["tokens"]  # the first epoch does not show it
    with pytest.raises(UserError, match=rf"the data has changed since the checkpoint \({name} .* -> {value}\)"):
        check_same_data(before, now)
    assert check_same_data(record("text"), record("text", **{name: value})) is None


def test_other_documents_held_out_are_other_data(record):
    before, now = record("text", val_fraction=0.1), record("text", val_fraction=0.3)
    with pytest.raises(UserError, match="tokens of an epoch"):
        check_same_data(before, now)


def test_a_checkpoint_of_an_earlier_version_still_resumes(record):
    now = record("conversation", redraw_each_epoch=True)
    before = {key: value for key, value in now.items() if key not in ("redraw_each_epoch", "tokens of an epoch")}
    assert check_same_data(before, now) is None
    with pytest.raises(UserError, match="seed 2 -> 1"):
        check_same_data({**before, "seed": 2}, now)


def test_the_record_survives_a_checkpoint(record):
    now = record("conversation")
    assert check_same_data(json.loads(json.dumps(now)), now) is None


def test_another_content_of_as_many_tokens_is_other_data_and_moved_files_are_not(record, tmp_path):
    before = record("text")
    file = tmp_path / "text.jsonl"
    file.touch()
    assert check_same_data(before, record("text")) is None
    file.write_text(file.read_text().replace('"a"', '"b"'))
    with pytest.raises(UserError, match="content that of the checkpoint -> another in the files"):
        check_same_data(before, record("text"))
