"""The stages that adapt a model, each a run of seconds: what they learn, write, resume and refuse."""

import csv
import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minimind_jax.adapt_config import (
    ClassifyConfig,
    DistillConfig,
    DPOConfig,
    LabelConfig,
    PreferenceConfig,
    RewardConfig,
    TeacherConfig,
)
from minimind_jax.config import CheckpointConfig, LoRAConfig, OptimizerConfig, SFTConfig
from minimind_jax.convert.hf import load_hf, load_labels
from minimind_jax.convert.load import load_merged, load_parts
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.evaluate.score_command import predict, score
from minimind_jax.inference.generate import load_generator
from minimind_jax.inference.score import Scorer
from minimind_jax.stages.classify import classify
from minimind_jax.stages.distill import distill
from minimind_jax.stages.dpo import dpo
from minimind_jax.stages.export import export_checkpoint
from minimind_jax.stages.pretrain import pretrain
from minimind_jax.stages.reward import reward
from minimind_jax.stages.sft import sft
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import WALL_CLOCK, read_metrics

ADAPTERS = LoRAConfig(rank=4, alpha=8)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(world):
    """Pairs whose better answer says `birds`, and texts labelled by their first word."""
    rng = random.Random(2)
    words = "the cat sat on a mat while dogs run over green hills".split()

    def say(count):
        return " ".join(rng.choice(words) for _ in range(count))

    def pair():
        prompt = {"role": "user", "content": say(4)}
        answers = [{"role": "assistant", "content": f"{start} {say(rng.randint(1, 5))}"} for start in ("birds", "dogs")]
        return {name: [prompt, answer] for name, answer in zip(("chosen", "rejected"), answers, strict=True)}

    def labelled():
        label = rng.choice(["cat", "dogs", "birds"])
        return {"text": f"{label} {say(rng.randint(1, 9))}", "label": label}

    folder = world.folder
    texts = [labelled() for _ in range(150)]
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(texts)
    names = {"cat", "dogs", "birds"}
    several = [{"text": t["text"], "label": sorted(names & {t["label"], t["text"].split()[-1]})} for t in texts]
    return {
        "pairs": write_lines(folder / "pairs.jsonl", [pair() for _ in range(60)]),
        "labels": write_lines(folder / "labels.jsonl", texts),
        "csv": str(folder / "labels.csv"),
        "several": write_lines(folder / "several.jsonl", several),
    }


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A pretrained model to start from."""
    return str(pretrain(world.pretrain(tmp_path_factory.mktemp("base") / "base", checkpoint=CheckpointConfig(0))))


@pytest.fixture
def make(world, files, base):
    def make(cls, run, train, **changes):
        rate = OptimizerConfig(learning_rate=changes.pop("rate", 3e-3))
        own = {
            "data": {"train": (files.get(train, train),), "seq_len": 64, "val_fraction": 0.2, "packing": "best_fit"},
            "training": {"steps": 24, "eval_every": 8, "eval_rows": 0, "batch_tokens": 256},
        }
        for section in own:
            own[section].update(changes.pop(section, {}))
        changes = {"init_from": base, "optimizer": rate, "tokenizer": "", **changes}
        return world._config(cls, run, "chat.jsonl", "best_fit", **own, **changes)

    return make


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(RunFolder(run).metrics_file)]


def last(run, key):
    return next(row[key] for row in reversed(rows_of(run)) if key in row)


def assert_resumes_exactly(function, config, tmp_path, step=12):
    """A run cut off right after the save of `step` ends with the metrics and the model of one that was not."""
    whole = RunFolder(function(config))
    copy = RunFolder(shutil.copytree(whole.path, tmp_path / "cut"))
    for other in copy.checkpoint_steps():
        if other > step:
            shutil.rmtree(copy.checkpoints / str(other))
    assert copy.checkpoint_steps()[-1] == step
    shutil.rmtree(copy.model)
    lines = copy.metrics_file.read_text("utf-8").splitlines(keepends=True)
    copy.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), "utf-8")
    function(dataclasses.replace(config, run=str(copy.path), resume="must"))
    assert rows_of(copy.path) == rows_of(whole.path)
    for file in whole.model.glob("*.safetensors"):
        assert (copy.model / file.name).read_bytes() == file.read_bytes()


KEEP_ALL = CheckpointConfig(every=4, keep=10)

# LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(make, tmp_path):
    return make(SFTConfig, tmp_path / "lora", "sft", lora=ADAPTERS, data={"train": ()}, rate=1e-2)


def with_chats(config, world):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(world.folder / "chat.jsonl"),)))


def test_lora_trains_saves_and_holds_adapters_only(lora, world, base, capsys):
    config = with_chats(lora, world)
    run = RunFolder(sft(config))
    assert "adapters" in run.read_environment()["run"]
    assert last(run.path, "val_loss") < rows_of(run.path)[0]["val_loss"] - 0.02
    tensors = load_file(run.model / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7 and not (run.model / "model.safetensors").exists()
    loaded = load_parts(run.model)
    assert loaded.base == RunFolder(base).model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, load_hf(RunFolder(base).model)[1])
    sizes = sum(path.stat().st_size for path in (run.checkpoints / "24").rglob("*") if path.is_file())
    assert sizes < 400_000
    assert "merge-lora" in capsys.readouterr().out


def test_lora_resumes_exactly(lora, world, tmp_path):
    config = dataclasses.replace(
        with_chats(lora, world), checkpoint=KEEP_ALL, lora=dataclasses.replace(ADAPTERS, dropout=0.2)
    )
    assert_resumes_exactly(sft, config, tmp_path)


def test_a_base_that_changed_is_told(lora, world, base, tmp_path):
    copy = shutil.copytree(RunFolder(base).model, tmp_path / "base")
    config = dataclasses.replace(with_chats(lora, world), init_from=str(copy))
    sft(config)
    shutil.rmtree(RunFolder(config.run).model)
    tensors = load_file(copy / "model.safetensors")
    from safetensors.numpy import save_file

    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / "model.safetensors")
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=30))
    with pytest.raises(UserError, match="has changed since the checkpoint of step 24"):
        sft(longer)


def test_an_adapter_is_trained_further_or_merged(lora, world, make, tmp_path):
    first = RunFolder(sft(with_chats(lora, world)))
    config = dataclasses.replace(with_chats(lora, world), run=str(tmp_path / "more"), init_from=str(first.path))
    more = RunFolder(sft(config))
    assert rows_of(more.path)[0]["val_loss"] == pytest.approx(last(first.path, "val_loss"), abs=1e-5)
    assert load_parts(more.model).base == load_parts(first.model).base
    with pytest.raises(UserError, match=r"has the ranks q_proj 4, .* and lora asks for q_proj 8.*merge-lora"):
        sft(dataclasses.replace(config, run=str(tmp_path / "other"), lora=dataclasses.replace(ADAPTERS, rank=8)))
    whole = dataclasses.replace(config, run=str(tmp_path / "whole"), lora=LoRAConfig(), optimizer=OptimizerConfig())
    merged = RunFolder(sft(whole))
    assert rows_of(merged.path)[0]["val_loss"] == pytest.approx(last(first.path, "val_loss"), abs=1e-5)
    assert (merged.model / "model.safetensors").is_file()


def test_a_checkpoint_of_adapters_is_exported_whole(lora, world, tmp_path):
    run = RunFolder(sft(dataclasses.replace(with_chats(lora, world), checkpoint=KEEP_ALL)))
    assert export_checkpoint(str(run.path), tmp_path / "out", "newest", "float32") == 24
    config, params = load_hf(tmp_path / "out")
    expected_config, expected = load_merged(run.model)
    assert config == expected_config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_lora_needs_a_model(lora, world):
    config = dataclasses.replace(with_chats(lora, world), init_from="", tokenizer=str(world.folder / "tokenizer"))
    with pytest.raises(UserError, match="there is no model to adapt"):
        sft(config)


# DPO ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dpo_config(make, tmp_path):
    return make(DPOConfig, tmp_path / "dpo", "pairs", data={"system_prompt_probability": 0.0}, rate=1e-3)


@pytest.mark.parametrize("adapters", [LoRAConfig(), ADAPTERS], ids=["all", "lora"])
def test_dpo_learns_what_is_preferred(dpo_config, adapters):
    config = dataclasses.replace(dpo_config, lora=adapters)
    rows = rows_of(dpo(config))
    first = rows[0]
    assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6)  # the policy is the reference
    assert first["val_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last(config.run, "val_rewards/accuracies") > 0.9
    assert last(config.run, "val_rewards/margins") > 0.1
    assert "rewards/chosen" in next(row for row in rows if "loss" in row)
    report = RunFolder(config.run).report_file.read_text("utf-8")
    assert "| step | loss | chosen nll | rewards/margins | rewards/accuracies |" in report


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_other_losses_learn_it_too(dpo_config, loss):
    beta = {"ipo": 0.1, "simpo": 2.5, "orpo": 0.5}[loss]
    config = dataclasses.replace(dpo_config, preference=PreferenceConfig(loss=loss, beta=beta))
    dpo(config)
    assert last(config.run, "val_rewards/accuracies") > 0.8


def test_dpo_resumes_exactly(dpo_config, tmp_path):
    assert_resumes_exactly(dpo, dataclasses.replace(dpo_config, checkpoint=KEEP_ALL), tmp_path)


def test_a_reference_computed_before_changes_nothing(dpo_config, tmp_path):
    dpo(dpo_config)
    before = dataclasses.replace(
        dpo_config, run=str(tmp_path / "before"), preference=PreferenceConfig(precompute_reference=True)
    )
    run = RunFolder(dpo(before))
    assert (run.path / "reference.npz").is_file()
    for ours, theirs in zip(rows_of(run.path), rows_of(dpo_config.run), strict=True):
        assert ours.keys() == theirs.keys()
        ties = {"rewards/accuracies", "val_rewards/accuracies"} if ours["step"] < 2 else set()
        for key in ours.keys() - ties - {"exported"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("damage", ["other rows", "cut off"])
def test_a_reference_of_other_rows_is_computed_again(damage, dpo_config, tmp_path):
    config = dataclasses.replace(
        dpo_config, preference=PreferenceConfig(precompute_reference=True), checkpoint=CheckpointConfig(0)
    )
    short = dataclasses.replace(config.data, seq_len=32)
    run = RunFolder(dpo(dataclasses.replace(config, data=short) if damage == "other rows" else config))
    if damage == "cut off":
        file = run.path / "reference.npz"
        file.write_bytes(file.read_bytes()[:100])
    for leftover in (run.checkpoints, run.model):
        shutil.rmtree(leftover)
    run.metrics_file.unlink()
    rows = rows_of(dpo(config))
    assert rows[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_rows_of_any_length(make, stage, tmp_path):
    """Lengths that leave 2 or 3 modulo 4, too."""
    cls, function = (DPOConfig, dpo) if stage == "dpo" else (RewardConfig, reward)
    run = function(
        make(cls, tmp_path / stage, "pairs", data={"seq_len": 66}, training={"steps": 2, "batch_tokens": 264})
    )
    assert np.isfinite(last(run, "loss"))


def test_settings_that_change_the_base_are_named(dpo_config):
    dpo(dataclasses.replace(dpo_config, lora=ADAPTERS))
    with pytest.raises(UserError, match=r"other settings \(lora.alpha 8 -> 16"):
        dpo(dataclasses.replace(dpo_config, lora=dataclasses.replace(ADAPTERS, alpha=16)))


def test_dpo_over_an_adapter_measures_from_where_it_starts(lora, world, dpo_config):
    first = sft(with_chats(lora, world))
    config = dataclasses.replace(dpo_config, init_from=str(first), lora=ADAPTERS)
    rows = rows_of(dpo(config))
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
            dpo(make(DPOConfig, tmp_path / "run", file))


def test_long_prompts_are_cut_and_long_answers_left_out(make, tmp_path):
    user = {"role": "user", "content": "the cat sat " * 60}
    long = {"role": "assistant", "content": "green hills " * 80}
    answers = [{"role": "assistant", "content": text} for text in ("birds sing", "dogs run")]
    pairs = [{"chosen": [user, answers[0]], "rejected": [user, answers[1]]} for _ in range(8)]
    file = write_lines(tmp_path / "long.jsonl", [*pairs, {"chosen": [user, answers[0]], "rejected": [user, long]}])
    config = make(DPOConfig, tmp_path / "run", file, training={"steps": 2})
    run = RunFolder(dpo(config))
    facts = json.dumps(run.read_environment()["run"])
    assert "1 left out" in facts
    assert np.isfinite(last(run.path, "loss"))
    only = write_lines(tmp_path / "only.jsonl", [{"chosen": [user, answers[0]], "rejected": [user, long]}])
    with pytest.raises(UserError, match=r"the 1 pairs .* have answers longer than data\.seq_len 64; raise it"):
        dpo(make(DPOConfig, tmp_path / "none", only))


# Reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [LoRAConfig(), ADAPTERS], ids=["all", "lora"])
def test_a_reward_model_scores_as_it_was_trained(make, files, adapters, tmp_path):
    config = make(RewardConfig, tmp_path / "reward", "pairs", lora=adapters, rate=3e-3)
    run = RunFolder(reward(config))
    assert last(run.path, "val_accuracy") > 0.9
    assert load_labels(run.model).names == ("reward",)
    records = [json.loads(line) for line in open(files["pairs"], encoding="utf-8")]
    scorer, sides = Scorer(str(run.path)), []
    for name in ("chosen", "rejected"):
        sides.append(scorer.conversations([(record[name], None) for record in records])[:, 0])
    assert (sides[0] > sides[1]).mean() > 0.9
    chats = write_lines(tmp_path / "chats.jsonl", [{"conversations": records[0]["chosen"]}])
    assert score(str(run.path), [chats], str(tmp_path / "scored.jsonl")) == 1
    written = json.loads((tmp_path / "scored.jsonl").read_text("utf-8"))
    assert written["score"] == pytest.approx(float(sides[0][0]), abs=1e-4)
    with pytest.raises(UserError, match="is a classifier or reward model, and cannot write text"):
        sft(make(SFTConfig, tmp_path / "sft", str(tmp_path / "chats.jsonl"), init_from=str(run.path)))


def test_models_with_scores_write_no_text(make, tmp_path):
    run = classify(make(ClassifyConfig, tmp_path / "classify", "labels", training={"steps": 2}))
    with pytest.raises(UserError, match="has no words to say; use minimind classify predict"):
        load_generator(str(run))
    with pytest.raises(UserError, match="a teacher must be a language model"):
        distill(make(DistillConfig, tmp_path / "student", "labels", teacher=TeacherConfig(model=str(run))))


def test_reward_resumes_exactly(make, tmp_path):
    config = make(RewardConfig, tmp_path / "reward", "pairs", checkpoint=KEEP_ALL)
    assert_resumes_exactly(reward, config, tmp_path)


# Classifiers ----------------------------------------------------------------------------------------------------------


def test_a_classifier_learns_names_its_labels_and_predicts(make, tmp_path, capsys):
    config = make(ClassifyConfig, tmp_path / "classify", "labels", training={"steps": 60, "eval_every": 20}, rate=1e-2)
    run = RunFolder(classify(config))
    results = json.loads((run.path / "results.json").read_text("utf-8"))
    assert results["accuracy"] > 0.9
    assert results["accuracy"] == pytest.approx(last(run.path, "val_accuracy"), abs=1e-6)
    assert (run.path / "confusion.png").stat().st_size > 5000
    assert "Held-out results" in run.report_file.read_text("utf-8")
    assert load_labels(run.model).names == ("birds", "cat", "dogs")
    texts = write_lines(tmp_path / "new.jsonl", [{"text": "dogs sat on a mat"}, {"text": "birds"}])
    assert predict(str(run.path), [texts], str(tmp_path / "out.jsonl"), top=2) == 2
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [answer["predicted"] for answer in answers] == ["dogs", "birds"]
    assert answers[0]["top"][0]["label"] == "dogs" and len(answers[0]["top"]) == 2


def test_a_classifier_is_transformers_own(make, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    run = RunFolder(classify(make(ClassifyConfig, tmp_path / "classify", "csv", training={"steps": 12})))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.model, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    assert model.config.id2label == {0: "birds", 1: "cat", 2: "dogs"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    texts = ["dogs", "the cat sat on a mat while dogs run over green hills", "birds sing 你好"]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(Scorer(str(run.path)).texts(texts), theirs, atol=1e-4)


def test_a_checkpoint_of_a_classifier_is_exported(make, tmp_path):
    config = make(ClassifyConfig, tmp_path / "classify", "labels", checkpoint=KEEP_ALL, lora=ADAPTERS)
    run = RunFolder(classify(config))
    assert export_checkpoint(str(run.path), tmp_path / "out", "newest", "float32") == 24
    assert load_labels(tmp_path / "out") == load_labels(run.model)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, load_file(run.model / "model.safetensors")[name], atol=1e-6, err_msg=name)


def test_several_labels(make, tmp_path):
    config = make(ClassifyConfig, tmp_path / "several", "several", training={"steps": 40}, rate=1e-2)
    run = RunFolder(classify(config))
    assert load_labels(run.model).several
    assert json.loads((run.path / "results.json").read_text("utf-8"))["accuracy"] > 0.5
    texts = write_lines(tmp_path / "new.jsonl", [{"text": "dogs sat"}])
    predict(str(run.path), [texts], str(tmp_path / "out.jsonl"))
    answer = json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    assert set(answer["probabilities"]) == {"birds", "cat", "dogs"}


def test_patience_ends_a_run_with_its_best_model(make, tmp_path):
    rng = random.Random(0)
    noise = [{"text": f"cat {n} dogs {rng.random()}", "label": rng.choice("ab")} for n in range(120)]
    training = {"steps": 400, "eval_every": 4, "patience": 2}
    file = write_lines(tmp_path / "noise.jsonl", noise)  # which can be learned by heart only
    config = make(ClassifyConfig, tmp_path / "patient", file, training=training, rate=1e-2)
    run = RunFolder(classify(config))
    losses = {row["step"]: row["val_loss"] for row in rows_of(run.path) if row["step"] and "val_loss" in row}
    assert max(losses) < 400
    ordered = [losses[step] for step in sorted(losses)]
    assert len(ordered) - 1 - ordered.index(min(ordered)) == 2
    results = json.loads((run.path / "results.json").read_text("utf-8"))
    best = min(losses, key=losses.get)
    accuracy = next(row["val_accuracy"] for row in rows_of(run.path) if row["step"] == best and "val_accuracy" in row)
    assert results["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert classify(config) == run.path


def test_classify_resumes_exactly(make, tmp_path):
    config = make(ClassifyConfig, tmp_path / "classify", "labels", checkpoint=KEEP_ALL, lora=ADAPTERS)
    assert_resumes_exactly(classify, config, tmp_path)


def test_class_weights_even_out_rare_classes(make, tmp_path):
    labels = [{"text": f"cat {n}", "label": "cat"} for n in range(90)] + [{"text": "dogs", "label": "dogs"}] * 10
    file = write_lines(tmp_path / "rare.jsonl", labels)
    for weights in ("none", "balanced"):
        config = make(
            ClassifyConfig, tmp_path / weights, file, classify=LabelConfig(class_weights=weights),
            data={"val_fraction": 0.0}, training={"steps": 1}, rate=0.0,
        )  # fmt: skip
        classify(config)
    plain, balanced = (last(tmp_path / name, "loss") for name in ("none", "balanced"))
    assert plain == pytest.approx(balanced, abs=0.2) and plain != balanced


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b"}], "missing field `label`"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 1.5}], "expected text or a whole number"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "text is empty"),
        ([{"body": "a", "label": "x"}], "expected a field `text`.*text_field"),
        ([{"text": "a", "label": "x"}] * 2, "only the label 'x'; a classifier needs at least two"),
    ],
)
def test_broken_labels_are_told(records, message, make, tmp_path):
    file = write_lines(tmp_path / "broken.jsonl", records)
    with pytest.raises(UserError, match=message):
        classify(make(ClassifyConfig, tmp_path / "run", file))


def test_a_label_that_training_does_not_know_is_told(make, tmp_path):
    val = write_lines(tmp_path / "val.jsonl", [{"text": "a", "label": "mouse"}])
    with pytest.raises(UserError, match=r"val.jsonl:1: the label 'mouse' is not in the training data"):
        classify(make(ClassifyConfig, tmp_path / "run", "labels", data={"val": (val,)}))


# Distillation ---------------------------------------------------------------------------------------------------------


def test_a_student_learns_from_its_teacher(make, world, base, tmp_path):
    teacher = sft(with_chats(make(SFTConfig, tmp_path / "teacher", "sft", training={"steps": 60}), world))
    config = with_chats(
        make(DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=str(teacher), alpha=0.0)), world
    )
    run = distill(config)
    rows = rows_of(run)
    assert last(run, "val_divergence") < rows[0]["val_divergence"] / 2
    assert last(run, "val_loss") < rows[0]["val_loss"]
    load_hf(RunFolder(run).model)


def test_distill_resumes_exactly(make, world, base, tmp_path):
    config = make(
        DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=base, divergence="jsd"),
        checkpoint=KEEP_ALL, lora=ADAPTERS,
    )  # fmt: skip
    assert_resumes_exactly(distill, with_chats(config, world), tmp_path)


def test_a_teacher_asked_once_teaches_the_same(make, world, base, tmp_path):
    """All words stored: the losses of one that is asked at every step. Few: near them, and a run goes on exactly."""
    teacher = sft(with_chats(make(SFTConfig, tmp_path / "teacher", "sft", training={"steps": 20}), world))

    def student(name, top_k):
        wanted = TeacherConfig(model=str(teacher), alpha=0.0, top_k=top_k)
        return with_chats(make(DistillConfig, tmp_path / name, "sft", teacher=wanted, checkpoint=KEEP_ALL), world)

    words = Tokenizer.load(RunFolder(base).model).vocab_size
    asked, stored, few = (distill(student(f"top {k}", k)) for k in (0, words, 8))
    for name in ("divergence", "val_divergence"):
        np.testing.assert_allclose(last(stored, name), last(asked, name), rtol=1e-3)
    assert 0 < last(few, "val_divergence") < rows_of(few)[0]["val_divergence"]
    sizes = {file.suffix: file.stat().st_size for file in (few / "teacher").iterdir()}
    assert sizes[".log_probs"] == 2 * sizes[".ids"] > 0
    assert_resumes_exactly(distill, student("resumed", 8), tmp_path)


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
        distill(dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)))


def test_a_teacher_with_another_vocabulary_is_refused(make, world, base, tmp_path):
    copy = shutil.copytree(RunFolder(base).model, tmp_path / "teacher")
    train_bpe(["another text altogether"] * 3, tmp_path / "tokenizer", 300, show_progress=False)
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", copy / "tokenizer.json")
    config = make(DistillConfig, tmp_path / "student", "sft", teacher=TeacherConfig(model=str(copy)))
    with pytest.raises(UserError, match=r"has another vocabulary .*minimind generate"):
        distill(with_chats(config, world))
    with pytest.raises(UserError, match="distill needs a teacher"):
        distill(with_chats(dataclasses.replace(config, teacher=TeacherConfig()), world))
