"""Settings that change nothing are refused, or told."""

import dataclasses

import pytest

from minimind_jax.adapt_config import ClassifyConfig, DistillConfig, DPOConfig, RewardConfig, TeacherConfig
from minimind_jax.config import DataConfig, LoRAConfig, OptimizerConfig, PretrainConfig, SampleConfig, SFTConfig
from minimind_jax.errors import UserError
from minimind_jax.stages.effect import check_effect


def changed(cls, section, **values):
    return dataclasses.replace(cls(), **{section: dataclasses.replace(getattr(cls(), section), **values)})


@pytest.mark.parametrize("cls", [DPOConfig, DistillConfig, RewardConfig, ClassifyConfig])
def test_z_loss_is_refused_where_there_is_none(cls):
    with pytest.raises(UserError, match=r"training.z_loss 0.0001: has no effect in this stage; leave it out"):
        check_effect(changed(cls, "training", z_loss=1e-4))
    check_effect(changed(SFTConfig, "training", z_loss=1e-4))


@pytest.mark.parametrize("cls", [RewardConfig, ClassifyConfig])
def test_so_are_samples_of_models_that_write_nothing(cls):
    with pytest.raises(UserError, match=r"samples.prompts \['Hello'\]"):
        check_effect(changed(cls, "samples", prompts=("Hello",)))
    with pytest.raises(UserError, match=r"training.sample_every 5"):
        check_effect(changed(cls, "training", sample_every=5))


@pytest.mark.parametrize("cls", [DPOConfig, RewardConfig, ClassifyConfig])
def test_so_is_a_packing_of_pairs_and_labels(cls):
    for packing in ("pad", "concat"):
        with pytest.raises(UserError, match=rf"data.packing {packing}"):
            check_effect(changed(cls, "data", packing=packing))
    check_effect(changed(cls, "data", packing="best_fit"))


def test_so_are_the_chances_of_a_template_that_is_not_used_and_adapters_without_a_rank():
    for cls in (PretrainConfig, ClassifyConfig):
        with pytest.raises(UserError, match=r"data.redraw_each_epoch True"):
            check_effect(changed(cls, "data", redraw_each_epoch=True))
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
    for cls in (PretrainConfig, SFTConfig, DPOConfig, RewardConfig, ClassifyConfig, DistillConfig):
        check_effect(cls())
    assert capsys.readouterr().out == ""
