"""The stage dpo: learning, resuming, its reference, and what it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, last, rows_of, with_chats
from worlds import ADAPTERS, write_lines

from minimind_jax.config.sections import CheckpointConfig, LoRAConfig
from minimind_jax.config.stages import DPOConfig, PreferenceConfig, RewardConfig
from minimind_jax.errors import UserError
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder


@pytest.fixture
def dpo_config(make, tmp_path):
    return make(DPOConfig, tmp_path / "dpo", "pairs", data={"system_prompt_probability": 0.0}, rate=2e-3)


@pytest.mark.parametrize(
    "adapters",
    [pytest.param(LoRAConfig(), id="all"), pytest.param(ADAPTERS, id="lora", marks=pytest.mark.slow)],
)
def test_dpo_learns_what_is_preferred(dpo_config, adapters):
    config = dataclasses.replace(dpo_config, lora=adapters)
    rows = rows_of(start(config))
    first = rows[0]
    assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6)  # the policy is the reference
    assert first["val_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last(config.run, "val_rewards/accuracies") > 0.9
    assert last(config.run, "val_rewards/margins") > 0.1
    assert "rewards/chosen" in next(row for row in rows if "loss" in row)
    report = RunFolder(config.run).report_file.read_text("utf-8")
    assert "| step | loss | chosen nll | rewards/margins | rewards/accuracies |" in report


@pytest.mark.parametrize("loss", ["orpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "simpo"))])
def test_other_losses_learn_it_too(dpo_config, loss):
    beta = {"ipo": 0.1, "simpo": 2.5, "orpo": 0.5}[loss]
    config = dataclasses.replace(dpo_config, preference=PreferenceConfig(loss=loss, beta=beta))
    start(config)
    assert last(config.run, "val_rewards/accuracies") > 0.8


def test_dpo_resumes_exactly(dpo_config, tmp_path):
    assert_resumes_exactly(dataclasses.replace(dpo_config, checkpoint=KEEP_ALL), tmp_path)


@pytest.mark.slow
def test_a_reference_computed_before_changes_nothing(dpo_config, tmp_path):
    start(dpo_config)
    before = dataclasses.replace(
        dpo_config, run=str(tmp_path / "before"), preference=PreferenceConfig(precompute_reference=True)
    )
    run = RunFolder(start(before))
    assert list((run.path / "reference").glob("*.log_probs"))
    for ours, theirs in zip(rows_of(run.path), rows_of(dpo_config.run), strict=True):
        assert ours.keys() == theirs.keys()
        ties = {"rewards/accuracies", "val_rewards/accuracies"} if ours["step"] < 2 else set()
        for key in ours.keys() - ties - {"exported"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["other rows", "cut off"])
def test_a_reference_of_other_rows_is_computed_again(damage, dpo_config, tmp_path):
    config = dataclasses.replace(
        dpo_config, preference=PreferenceConfig(precompute_reference=True), checkpoint=CheckpointConfig(0)
    )
    short = dataclasses.replace(config.data, seq_len=32)
    run = RunFolder(start(dataclasses.replace(config, data=short) if damage == "other rows" else config))
    if damage == "cut off":
        file = next((run.path / "reference").glob("*.log_probs"))
        file.write_bytes(file.read_bytes()[:100])
    for leftover in (run.checkpoints, run.model):
        shutil.rmtree(leftover)
    run.metrics_file.unlink()
    rows = rows_of(start(config))
    assert rows[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_rows_of_any_length(make, stage, tmp_path):
    """Lengths that leave 2 or 3 modulo 4, too."""
    cls = DPOConfig if stage == "dpo" else RewardConfig
    run = start(make(cls, tmp_path / stage, "pairs", data={"seq_len": 66}, training={"steps": 2, "batch_tokens": 264}))
    assert np.isfinite(last(run, "loss"))


@pytest.mark.slow
def test_settings_that_change_the_base_are_named(dpo_config):
    start(dataclasses.replace(dpo_config, lora=ADAPTERS))
    with pytest.raises(UserError, match=r"other settings \(lora.alpha 8 -> 16"):
        start(dataclasses.replace(dpo_config, lora=dataclasses.replace(ADAPTERS, alpha=16)))


@pytest.mark.slow
def test_dpo_over_an_adapter_measures_from_where_it_starts(lora, world, dpo_config):
    first = start(with_chats(lora, world))
    config = dataclasses.replace(dpo_config, init_from=str(first), lora=ADAPTERS)
    rows = rows_of(start(config))
    assert rows[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_broken_pairs_are_told(make, world, tmp_path):
    user = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in "ab")
    empty = {"role": "assistant", "content": " "}
    for number, (record, message) in enumerate([
        ({"chosen": [user, good], "rejected": [user, good]}, "chosen and rejected are the same"),
        ({"chosen": [user, good], "rejected": [user, empty]}, "rejected has no answer of its own"),
        ({"chosen": [user], "rejected": [user, bad]}, "chosen has no answer of its own"),
        ({"chosen": [user, good]}, "missing field `rejected`"),
        ({"chosen": [user, good], "rejected": [user, bad], "margin": "x"}, "margin is a string"),
        ({"text": "plain"}, "missing field `chosen`.*minimind pretrain"),
    ]):  # fmt: skip
        file = write_lines(tmp_path / f"broken{number}.jsonl", [record])
        with pytest.raises(UserError, match=rf"broken{number}.jsonl:1: .*{message}"):
            start(make(DPOConfig, tmp_path / "run", file))


def test_long_prompts_are_cut_and_long_answers_left_out(make, tmp_path):
    user = {"role": "user", "content": "the cat sat " * 60}
    long = {"role": "assistant", "content": "green hills " * 80}
    answers = [{"role": "assistant", "content": text} for text in ("birds sing", "dogs run")]
    pairs = [{"chosen": [user, answers[0]], "rejected": [user, answers[1]]} for _ in range(8)]
    file = write_lines(tmp_path / "long.jsonl", [*pairs, {"chosen": [user, answers[0]], "rejected": [user, long]}])
    config = make(DPOConfig, tmp_path / "run", file, training={"steps": 2})
    run = RunFolder(start(config))
    facts = json.dumps(run.read_environment()["run"])
    assert "1 pairs left out whose answers have no room in a row" in facts
    assert np.isfinite(last(run.path, "loss"))
    only = write_lines(tmp_path / "only.jsonl", [{"chosen": [user, answers[0]], "rejected": [user, long]}])
    with pytest.raises(
        UserError,
        match=r"any of 1 pairs: their answers leave no room .* data\.seq_len 64; data\.seq_len \d",
    ):
        start(make(DPOConfig, tmp_path / "none", only))
