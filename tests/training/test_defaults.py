"""What a run takes where nothing is set: the stage's figures for much data, many small steps for a few records."""

import dataclasses

import pytest
from run_helpers import with_chats
from worlds import write_lines

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.config.sections import (
    MINIMIND_CHANCES,
    DataConfig,
    LoRAConfig,
    OptimizerConfig,
    SampleConfig,
    TrainingConfig,
)
from minimind_jax.config.settings import load_settings
from minimind_jax.config.stages import DistillConfig, DPOConfig, PretrainConfig, RewardConfig, SFTConfig
from minimind_jax.runs.samples import questions
from minimind_jax.stages import start
from minimind_jax.training.defaults import Amount, filled, following, open_chances, share_held_out, with_values
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import read_metrics

MUCH = Amount(10**7, 10**9, 10**9, 10**7)
STAGES = {"pretrain": PretrainConfig, "sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig,
          "classify": ClassifyConfig, "distill": DistillConfig, "lora": SFTConfig}  # fmt: skip


def amount(records, tokens_of_each, seq_len):
    tokens = records * tokens_of_each
    return Amount(records, tokens, tokens // 2, max(1, -(-tokens // seq_len)))


def settled(config, data, parameters=2_400_000, shards=1):
    return with_values(config, following(config, data, parameters, shards))


@pytest.mark.parametrize(
    "stage, batch, epochs, rate",
    [
        ("pretrain", 81920, 2, 3e-3),
        ("sft", 12288, 2, 1e-5),
        ("lora", 4096, 3, 5e-4),
        ("dpo", 8192, 1, 1e-6),
        ("reward", 8192, 1, 2e-5),
        ("classify", 2048, 10, 3e-4),
        ("distill", 12288, 1, 5e-6),
    ],
)
def test_much_data_has_the_figures_of_the_stage(stage, batch, epochs, rate):
    config = settled(load_settings(STAGES[stage], ["--config", stage]), MUCH, 64_000_000)
    assert (config.training.batch_tokens, config.training.epochs) == (batch, epochs)
    assert config.optimizer.learning_rate == rate
    assert config.optimizer.muon_learning_rate == (5e-3 if stage == "pretrain" else None)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("records", [30, 40, 200, 300, 2000])
def test_a_few_hundred_records_make_enough_steps(stage, records):
    config = load_settings(STAGES[stage], ["--config", stage])
    data = amount(records, 120, config.data.seq_len)
    config = settled(config, data)
    steps = config.training.epochs * -(-data.rows // config.rows_per_step)
    assert steps >= config.SHORTEST and config.training.epochs <= 100
    assert 1 <= config.training.eval_every <= steps / 5
    assert config.optimizer.learning_rate >= STAGES[stage].FIGURES.learning_rate


@pytest.mark.parametrize("records", [1, 3])
def test_one_record_is_a_row_a_step(records):
    config = settled(SFTConfig(init_from="base"), Amount(records, 60 * records, 30 * records, 1))
    assert config.rows_per_step == 1 and config.training.epochs == 100


def test_what_is_set_stays():
    config = SFTConfig(
        training=TrainingConfig(steps=7, batch_tokens=768 * 8, eval_every=0),
        optimizer=OptimizerConfig(learning_rate=1e-5),
    )
    assert following(config, amount(300, 120, 768), 1, 1) == {}
    assert settled(SFTConfig(training=TrainingConfig(tokens=500)), MUCH).training.epochs is None


def test_the_rows_of_a_step_divide_over_devices_and_parts():
    config = PretrainConfig(training=TrainingConfig(accumulation_steps=4))
    few = settled(config, amount(60, 200, 512), shards=8)
    assert few.rows_per_step == 8 and few.training.accumulation_steps == 4
    one = settled(config, amount(60, 200, 512))
    assert one.rows_per_step == 1 and one.training.accumulation_steps == 1


def test_the_rate_falls_with_the_data_and_the_size_of_the_model():
    config = SFTConfig(init_from="base")
    by_data = [settled(config, amount(n, 200, 768)).optimizer.learning_rate for n in (300, 10**5, 4 * 10**5, 10**6)]
    assert by_data == sorted(by_data, reverse=True) and by_data[-1] == 1e-5
    by_size = [settled(config, amount(300, 200, 768), size).optimizer.learning_rate for size in (2e6, 64e6, 6e8)]
    assert by_size == sorted(by_size, reverse=True) and len(set(by_size)) == 3
    adapters = dataclasses.replace(config, lora=LoRAConfig(rank=8))
    assert settled(adapters, amount(300, 200, 768), 6e8).optimizer.learning_rate == 5e-4


def test_held_out_records_are_enough_to_tell_and_few_to_miss():
    shares = {n: share_held_out(n, SFTConfig.FIGURES) for n in (1, 3, 19, 30, 300, 2000, 10**6)}
    assert [shares[n] for n in (1, 3, 19)] == [0, 0, 0]
    assert shares[30] == shares[300] == 0.05 and 30 <= 2000 * shares[2000] <= 60 and shares[10**6] == 0.001


def test_little_data_is_learned_as_chat_asks_for_it():
    config = SFTConfig()
    both = {"data.system_prompt_probability": 0.2, "data.empty_think_removal": 0.8}
    assert open_chances(config, True, 10**9) == both and config.data.chances == MINIMIND_CHANCES
    assert open_chances(config, True, 40_000) == dict.fromkeys(both, 0.0)
    assert open_chances(config, False, 40_000) == {}
    given = SFTConfig(data=DataConfig(system_prompt_probability=0.5))
    assert open_chances(given, True, 40_000) == {"data.empty_think_removal": 0.0}
    assert given.data.chances == {"system_prompt_probability": 0.5, "empty_think_removal": 0.8}


def test_without_known_data_the_figures_are_those_for_much():
    config = filled(SFTConfig(data=DataConfig(seq_len=340, packing="pad"), training=TrainingConfig(epochs=3)))
    assert config.training.batch_tokens % 340 == 0 and abs(config.training.batch_tokens - 12288) < 340
    assert (config.training.epochs, config.optimizer.learning_rate, config.data.val_fraction) == (3, 1e-5, 0.001)
    assert filled(config) == config


@pytest.fixture(scope="module")
def few(world, base, tmp_path_factory):
    """A finished run on a few conversations whose settings followed from them, and those settings as asked."""
    run = tmp_path_factory.mktemp("few") / "run"
    config = with_chats(SFTConfig(run=str(run), init_from=base, export_dtype="float32"), world)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=64, cache_dir=str(world.folder / "cache"), tokenizer_workers=1),
        training=TrainingConfig(epochs=1),
    )
    start(config)
    return RunFolder(run), config


@pytest.mark.slow
def test_a_run_records_the_values_and_is_finished_with_the_settings_as_asked(few, capsys):
    run, config = few
    written = run.read_config()
    assert written["training"]["batch_tokens"] == 128 and written["data"]["val_fraction"] == 0.05
    assert run.changed_settings(config) == {}
    rows = read_metrics(run.metrics_file)
    start(config)
    assert "is finished" in capsys.readouterr().out and read_metrics(run.metrics_file) == rows
    longer = dataclasses.replace(config, training=TrainingConfig(epochs=2))
    assert run.changed_settings(longer) == {"training.epochs": "1.0 -> 2.0"} or run.changed_settings(longer) == {
        "training.epochs": "1 -> 2"
    }
    faster = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.5))
    assert list(run.changed_settings(faster)) == ["optimizer.learning_rate"]


def test_a_longer_run_keeps_the_values_it_was_started_with(few, capsys):
    run, config = few
    before = run.read_config()
    start(dataclasses.replace(config, training=TrainingConfig(steps=80)))
    after = run.read_config()
    for key in ("data", "optimizer"):
        assert after[key] == before[key]
    assert after["training"]["batch_tokens"] == 128 and after["training"]["epochs"] is None
    assert "records to train on" not in capsys.readouterr().out


def test_metrics_have_the_loss_of_every_step_however_seldom_they_are_logged(few):
    rows = read_metrics(few[0].metrics_file)
    assert few[1].training.log_every == 10
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1))
    assert [row["step"] for row in rows if "grad_norm" in row][:4] == [1, 10, 20, 30]


def test_short_runs_say_what_to_change(few, capsys):
    run, config = few
    start(dataclasses.replace(config, run=str(run.path) + "-short", training=TrainingConfig(steps=2)))
    told = " ".join(capsys.readouterr().out.split())
    assert "2 steps in all" in told and "--training.epochs" in told and "--optimizer.learning_rate" in told
    assert "117 records to train on" in told


def test_samples_ask_what_the_data_asks(tmp_path):
    chats = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question},
                      {"role": "assistant", "content": "Yes."}]}
        for question in ("One?", "long " * 99, "One?", "Two?", "Three?")
    ]  # fmt: skip
    texts = [{"text": "The first of the texts goes on for quite some while."}, {"text": "Short one"}]
    pairs = [{"prompt": "Who?", "chosen": "I.", "rejected": "You."}]
    for kind, records, expected in (
        ("conversation", chats, ("One?", "Two?")),
        ("text", texts, ("The first of the texts goes on for", "Short")),
        ("preference", pairs, ("Who?",)),
    ):
        data = DataConfig(train=(write_lines(tmp_path / f"{kind}.jsonl", records),))
        config = SFTConfig(data=data, samples=SampleConfig(from_data=2))
        assert tuple(question.text for question in questions(config, kind)) == expected
        own = dataclasses.replace(config, samples=SampleConfig(prompts=("mine",), from_data=2))
        assert questions(own, kind) == [("mine", ())]
        assert questions(dataclasses.replace(config, samples=SampleConfig()), kind) == []


def test_samples_read_the_data_as_the_run_does(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"instruction": "谁？", "output": "我。", "note": 1}\n', "gb18030")
    data = DataConfig(train=(str(file),), encoding="gb18030", ignore_fields=("note",))
    assert questions(SFTConfig(data=data, samples=SampleConfig(from_data=1)), "conversation") == [("谁？", ())]
