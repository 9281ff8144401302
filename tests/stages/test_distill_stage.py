"""The stage distill: a teacher asked at every step or once, resuming, and what it refuses."""

import dataclasses
import shutil

import numpy as np
import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, last, rows_of, with_chats
from worlds import ADAPTERS

from minimind_jax.config.stages import DistillConfig, SFTConfig, TeacherConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(make, world, base, tmp_path):
    teacher = start(with_chats(make(SFTConfig, tmp_path / "teacher", "sft", training={"steps": 60}), world))
    config = with_chats(
        make(DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=str(teacher), alpha=0.0)), world
    )
    run = start(config)
    rows = rows_of(run)
    assert last(run, "val_divergence") < rows[0]["val_divergence"] / 2
    assert last(run, "val_loss") < rows[0]["val_loss"]
    load_hf(RunFolder(run).model)


@pytest.mark.slow
def test_distill_resumes_exactly(make, world, base, tmp_path):
    config = make(
        DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=base, divergence="jsd"),
        checkpoint=KEEP_ALL, lora=ADAPTERS,
    )  # fmt: skip
    assert_resumes_exactly(with_chats(config, world), tmp_path)


@pytest.mark.slow
def test_a_teacher_asked_once_teaches_the_same(make, world, base, tmp_path):
    """All words stored: the losses of one that is asked at every step. Few: near them, and a run goes on exactly."""
    teacher = start(with_chats(make(SFTConfig, tmp_path / "teacher", "sft", training={"steps": 20}), world))

    def student(name, top_k):
        wanted = TeacherConfig(model=str(teacher), alpha=0.0, top_k=top_k)
        return with_chats(make(DistillConfig, tmp_path / name, "sft", teacher=wanted, checkpoint=KEEP_ALL), world)

    words = Tokenizer.load(RunFolder(base).model).vocab_size
    asked, stored, few = (start(student(f"top {k}", k)) for k in (0, words, 8))
    for name in ("divergence", "val_divergence"):
        np.testing.assert_allclose(last(stored, name), last(asked, name), rtol=1e-3)
    assert 0 < last(few, "val_divergence") < rows_of(few)[0]["val_divergence"]
    sizes = {file.suffix: file.stat().st_size for file in (few / "teacher").iterdir()}
    assert sizes[".log_probs"] == 2 * sizes[".ids"] > 0
    config = student("resumed", 8)
    assert_resumes_exactly(config, tmp_path)
    with pytest.raises(UserError, match=r"teacher.top_k 8 -> 4.*go on with those"):
        start(dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, top_k=4)))
    shutil.rmtree(RunFolder(teacher).model)
    shutil.copytree(RunFolder(base).model, RunFolder(teacher).model)
    shutil.rmtree(RunFolder(config.run).model)
    with pytest.raises(UserError, match=r"teacher.model .* holds other weights than when .* was started"):
        start(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "concat"}, "data.packing concat cuts documents at other places in every epoch"),
        ({"redraw_each_epoch": True}, "data.redraw_each_epoch changes the conversations"),
    ],
)
def test_a_stored_teacher_needs_the_same_pieces_in_every_epoch(changes, message, make, world, base, tmp_path):
    config = with_chats(make(DistillConfig, tmp_path / "run", "sft", teacher=TeacherConfig(model=base, top_k=4)), world)
    with pytest.raises(UserError, match=message):
        start(dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)))


def test_a_teacher_with_another_vocabulary_is_refused(make, world, base, tmp_path):
    copy = shutil.copytree(RunFolder(base).model, tmp_path / "teacher")
    train_bpe(["another text altogether"] * 3, tmp_path / "tokenizer", 300)
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", copy / "tokenizer.json")
    config = make(DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=str(copy)))
    with pytest.raises(UserError, match=r"has another vocabulary .*minimind generate"):
        start(with_chats(config, world))
    with pytest.raises(UserError, match="distill needs a teacher"):
        start(with_chats(dataclasses.replace(config, teacher=TeacherConfig()), world))
