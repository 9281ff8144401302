"""Settings that change nothing are refused, or told."""

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.config.sections import DataConfig, LoRAConfig, OptimizerConfig, SampleConfig
from minimind_jax.config.settings import load_settings
from minimind_jax.config.stages import (
    DistillConfig,
    DPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    TeacherConfig,
)
from minimind_jax.errors import UserError
from minimind_jax.runs.effect import check_effect
from minimind_jax.stages import STAGES, start
from minimind_jax.training.run import RunFolder, flat, plain


@pytest.mark.parametrize("cls", [DPOConfig, DistillConfig, RewardConfig, ClassifyConfig])
def test_z_loss_is_refused_where_there_is_none(cls):
    with pytest.raises(UserError, match=r"training.z_loss 0.0001: has no effect in this stage, .*; leave it out"):
        load_settings(cls, ["--training.z_loss", "0.0001"])
    assert load_settings(SFTConfig, ["--training.z_loss", "0.0001"]).training.z_loss == 1e-4


@pytest.mark.parametrize("cls", [RewardConfig, ClassifyConfig])
def test_so_are_samples_of_models_that_write_nothing(cls):
    with pytest.raises(UserError, match=r"samples.prompts Hello: .* writes no text"):
        load_settings(cls, ["--samples.prompts", "Hello"])
    with pytest.raises(UserError, match=r"training.sample_every 5"):
        load_settings(cls, ["--training.sample_every", "5"])


@pytest.mark.parametrize("cls", [DPOConfig, RewardConfig, ClassifyConfig])
def test_so_is_a_packing_of_pairs_and_labels(cls):
    for packing in ("pad", "concat"):
        with pytest.raises(UserError, match=rf"data.packing {packing}"):
            load_settings(cls, ["--data.packing", packing])
    assert load_settings(cls, ["--data.packing", "best_fit"]) == cls()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "distill", "reward", "classify"])
def test_settings_that_every_stage_once_wrote_are_read_unless_they_were_set(stage, tmp_path):
    """config.yaml of a run of an earlier version holds them in every stage."""
    cls, file = STAGES[stage].config, tmp_path / "config.yaml"
    section = {"packing": "best_fit", "redraw_each_epoch": False}
    once = {"data": section, "training": {"z_loss": 0.0, "sample_every": 0}, "samples": plain(SampleConfig())}
    for name in ("system_prompt_probability", "empty_think_removal"):
        section[name] = getattr(cls().data, name, None)
    file.write_text(yaml.safe_dump(once))
    assert load_settings(cls, ["--config", str(file), "--data.train", "x"]).data.train == ("x",)
    run = RunFolder(tmp_path)
    now = flat(plain(cls())) | ({"data.packing": "best_fit"} if "data.packing" in flat(plain(cls())) else {})
    run.config_file.write_text(yaml.safe_dump({**flat(once), **now}))
    assert run.changed_settings(cls()) == ({"data.packing": "best_fit -> concat"} if stage == "pretrain" else {})
    run.config_file.write_text(yaml.safe_dump({**now, "training.z_loss": 0.5}))
    assert "training.z_loss" in run.changed_settings(cls())


def test_the_chances_of_a_template_that_is_not_used_are_refused_and_adapters_without_a_rank():
    for cls in (PretrainConfig, ClassifyConfig):
        with pytest.raises(UserError, match=r"data.redraw_each_epoch true"):
            load_settings(cls, ["--data.redraw_each_epoch", "true"])
    with pytest.raises(UserError, match=r"lora.alpha 32: without effect, for lora.rank is 0"):
        check_effect(SFTConfig(lora=LoRAConfig(alpha=32)))
    with pytest.raises(UserError, match=r"export_dtype float16: adapters .* always written in float32"):
        check_effect(SFTConfig(lora=LoRAConfig(rank=4), export_dtype="float16"))
    check_effect(ClassifyConfig(lora=LoRAConfig(rank=4), export_dtype="float16"))  # adapters that are merged


def test_what_another_setting_turns_off_is_told(capsys):
    check_effect(SFTConfig(optimizer=OptimizerConfig(muon_learning_rate=0.1, decay_fraction=0.5)))
    check_effect(SFTConfig(samples=SampleConfig(temperature=0.5), data=DataConfig(val=("a",), val_fraction=0.2)))
    check_effect(DistillConfig(teacher=TeacherConfig(jsd_beta=0.2)))
    told = capsys.readouterr().out
    for text in (
        "optimizer.muon_learning_rate 0.1 (of Muon)",
        "optimizer.decay_fraction 0.5 (it is of the schedule wsd)",
        "samples.temperature 0.5 (samples.prompts is empty)",
        "data.val_fraction 0.2 (data.val is set)",
        "teacher.jsd_beta 0.2 (teacher.divergence is not jsd)",
    ):
        assert f"without effect: {text}" in told
    check_effect(SFTConfig(samples=SampleConfig(from_data=2, temperature=0.5)))
    for cls in (PretrainConfig, SFTConfig, DPOConfig, RewardConfig, ClassifyConfig, DistillConfig):
        check_effect(cls())
    assert capsys.readouterr().out == ""


# Read only where another setting asks for it, which these runs do not.
ASKED_FOR = (
    *("training.profile_start", "training.stop_on_nan", "samples.", "optimizer.", "lora.", "tracking.project"),
    *("teacher.jsd_beta", "preference.gamma", "data.tokenizer_workers", "training.sample_every", "vision.train"),
)
NAMES = ("run", "resume", "init_from", "teacher.model")  # read from the settings written down


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "distill", "reward", "classify"])
def test_every_setting_of_a_stage_is_read_or_refused(stage, make, base, tmp_path, monkeypatch):
    """Which fields the program looks at while the stage runs; what it writes down or compares does not count."""
    data = {"dpo": "pairs", "reward": "pairs", "classify": "labels"}.get(stage, "sft")
    changes = {"teacher": TeacherConfig(model=base)} if stage == "distill" else {}
    config = make(STAGES[stage].config, tmp_path / "run", data, training={"steps": 3}, **changes)
    if data == "sft":
        file = "text.jsonl" if stage == "pretrain" else "chat.jsonl"
        train = (str(Path(config.data.cache_dir).parent / file),)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=train))
    read = set()
    sections = {type(config): ""} | {
        type(getattr(config, field.name)): f"{field.name}."
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(getattr(config, field.name))
    }

    def watched(section, plain_read):
        def look(self, name):
            code = sys._getframe(1).f_code
            is_copied = code.co_filename.endswith("dataclasses.py") or code.co_filename.startswith("<")
            if not is_copied and not {"plain", "__post_init__"} & set(code.co_qualname.split(".")):
                read.add(section + name)
            return plain_read(self, name)

        return look

    for cls, section in sections.items():
        monkeypatch.setattr(cls, "__getattribute__", watched(section, object.__getattribute__))
    start(config)
    fields = flat(plain(type(config)()))
    unread = {key for key in fields if key not in read and key not in NAMES}
    assert sorted(key for key in unread if not key.startswith(ASKED_FOR)) == []
