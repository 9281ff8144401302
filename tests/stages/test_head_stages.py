"""The stages reward and classify: learning, resuming, prediction, and what they refuse."""

import csv
import dataclasses
import io
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from run_helpers import KEEP_ALL, assembled, assert_resumes_exactly, export_newest, last, rows_of
from safetensors.numpy import load_file
from worlds import ADAPTERS, write_lines

from minimind_jax.config.classify import ClassifyConfig, LabelConfig
from minimind_jax.config.sections import LoRAConfig
from minimind_jax.config.stages import (
    DistillConfig,
    RewardConfig,
    SFTConfig,
    TeacherConfig,
)
from minimind_jax.config.tools import PredictConfig, ScoreConfig
from minimind_jax.convert.hf import Labels, load_hf, load_labels, save_hf
from minimind_jax.convert.load import from_hf
from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.evaluate.score_command import predict as run_predict
from minimind_jax.evaluate.score_command import score as run_score
from minimind_jax.inference.answer_file import PartialFile
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.score import Scorer
from minimind_jax.model.config import TowerConfig, Vision
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.labels import keep_labels
from minimind_jax.runs.parts import run_parameters
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder
from minimind_jax.training.speed import flops_per_token
from minimind_jax.training.tracking import is_exported, read_metrics


def predict(model, files, output="", **settings):
    run_predict(PredictConfig(model=str(model), input=tuple(files), output=str(output), **settings))
    return sum(1 for _ in iter_records([Path(output)])) if output else None


def score(model, files, output):
    run_score(ScoreConfig(model=str(model), input=tuple(files), output=str(output)))
    return sum(1 for _ in iter_records([Path(output)]))


@pytest.mark.parametrize(
    "adapters",
    [pytest.param(LoRAConfig(), id="all"), pytest.param(ADAPTERS, id="lora", marks=pytest.mark.slow)],
)
def test_a_reward_model_scores_as_it_was_trained(make, files, adapters, tmp_path):
    config = make(RewardConfig, tmp_path / "reward", "pairs", lora=adapters, rate=3e-3)
    run = RunFolder(start(config))
    assert last(run.path, "val_accuracy") > 0.9
    assert load_labels(run.model).names == ("reward",)
    records = [json.loads(line) for line in open(files["pairs"], encoding="utf-8")]
    scorer, sides = Scorer(str(run.path)), []
    for name in ("chosen", "rejected"):
        sides.append(scorer.conversations([(record[name], None) for record in records])[:, 0])
    assert (sides[0] > sides[1]).mean() > 0.9
    chats = write_lines(tmp_path / "chats.jsonl", [{"conversations": records[0]["chosen"]}])
    assert score(run.path, [chats], str(tmp_path / "scored.jsonl")) == 1
    cut = scorer.cut
    assert load_labels(run.model).max_tokens == scorer.max_tokens == 64
    assert scorer.conversations([([{"role": "user", "content": "birds " * 90}], None)]).shape == (1, 1)
    assert scorer.cut == cut + 1
    written = json.loads((tmp_path / "scored.jsonl").read_text("utf-8"))
    assert written["score"] == pytest.approx(float(sides[0][0]), abs=1e-4)
    for output, message in ((chats, "is one of the files of input"), (tmp_path / "scored.jsonl", "is there already")):
        with pytest.raises(UserError, match=message):
            score(run.path, [chats], str(output))
    again = tmp_path / "again.jsonl"
    with PartialFile(again), pytest.raises(UserError, match="is being written by another process"):
        score(run.path, [chats], str(again))
    broken = write_lines(tmp_path / "broken.jsonl", [{"conversations": "?"}])
    with pytest.raises(UserError, match=r"broken.jsonl:1"):
        score(run.path, [broken], str(again))
    assert [path.name for path in tmp_path.glob("again*")] == []
    with pytest.raises(UserError, match="is a classifier or reward model, and cannot write text"):
        start(make(SFTConfig, tmp_path / "sft", str(tmp_path / "chats.jsonl"), init_from=str(run.path)))


def test_models_with_scores_write_no_text(make, tmp_path, monkeypatch):
    monkeypatch.setattr("minimind_jax.training.speed.peak_flops", lambda compute: 1e6)
    run = start(make(ClassifyConfig, tmp_path / "classify", "labels", training={"steps": 2}))
    with pytest.raises(UserError, match="has no words to say; use minimind classify predict"):
        load_engine(str(run))
    with pytest.raises(UserError, match="a teacher must be a language model"):
        start(make(DistillConfig, tmp_path / "student", "labels", teacher=TeacherConfig(model=str(run))))
    again = make(ClassifyConfig, tmp_path / "again", "labels", init_from=str(run))  # its head, in whatever order
    model = assembled("classify", again).model
    row = next(row for row in read_metrics(RunFolder(run).metrics_file) if "mfu" in row)
    assert "loss" not in RunFolder(run).read_environment()["run"]  # which tells of pieces of the vocabulary
    flops = flops_per_token(model.config, again.data.seq_len, has_words=False)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e6, rel=1e-3)
    a, b = (
        np.asarray(run_parameters(assembled("classify", again).with_labels(Labels(labels))).load()[SCORE]["kernel"])
        for labels in (("birds", "cat", "dogs"), ("dogs", "birds", "cat"))
    )
    np.testing.assert_array_equal(a[:, [2, 0, 1]], b)


ONE, MANY, REWARD = Labels(("a", "b")), Labels(("a", "b"), several=True), Labels(("reward",))
TURNED = {ONE: Labels(("b", "a")), MANY: Labels(("b", "a"), several=True)}
HEADS = [  # of init_from, of the run, what is told
    (ONE, TURNED[ONE], None),
    (MANY, TURNED[MANY], None),
    (Labels(("LABEL_0",)), REWARD, None),
    (ONE, TURNED[MANY], "it gives one of 2 labels a text, and here it is any number of 2 labels a text"),
    (MANY, TURNED[ONE], "it gives any number of 2 labels a text, and here it is one of 2 labels a text"),
    (Labels(("a", "b", "c")), ONE, "it gives one of 3 labels a text, and here it is one of 2"),
    (Labels(("a", "c")), ONE, "it has other labels (new: 'b'; gone: 'c')"),
    (ONE, REWARD, "it gives one of 2 labels a text, and here it is one score (a reward model's)"),
    (MANY, REWARD, "it gives any number of 2 labels a text, and here it is one score"),
    (REWARD, ONE, "it gives one score (a reward model's), and here it is one of 2 labels a text"),
    (REWARD, MANY, "it gives one score (a reward model's), and here it is any number of 2 labels a text"),
]


def test_a_head_of_other_scores_is_left_out_with_a_word(make, base, tmp_path, capsys):
    folder = tmp_path / "start"
    config, params = load_hf(RunFolder(base).model)
    settings = make(ClassifyConfig, tmp_path / "run", "labels", init_from=str(folder))
    tokenizer = Tokenizer.load(RunFolder(base).model)
    for first, wanted, told in HEADS:
        head = np.arange(config.hidden_size * len(first.names), dtype=np.float32).reshape(-1, len(first.names))
        save_hf(folder, config, {**params, SCORE: {"kernel": head}}, tokenizer, "float32", labels=first)
        loaded = run_parameters(assembled("classify", settings).with_labels(wanted)).load()
        kept = head if first.names == ("LABEL_0",) else head[:, ::-1]
        assert np.array_equal(loaded[SCORE]["kernel"], kept) == (told is None), (first, wanted)
        said = capsys.readouterr().out
        assert (told or "") in said and ("left out" in said) == bool(told)


def test_what_a_model_sees_with_is_left_out_with_a_word(make, base, tmp_path, capsys):
    config, params = load_hf(RunFolder(base).model)
    sees = dataclasses.replace(config, vision=Vision(TowerConfig(16, 24, 2, 2, 20, 10), 12))
    sight = jax.jit(LanguageModel(sees).init)(jax.random.key(0))["vision"]
    tokenizer = Tokenizer.load(RunFolder(base).model)
    folder = save_hf(tmp_path / "sees", sees, {**params, "vision": sight}, tokenizer, "float32")
    settings = make(ClassifyConfig, tmp_path / "run", "labels", init_from=str(folder))
    run = assembled("classify", settings).with_labels(ONE)
    assert f"the projector of {folder} are left out: classify reads texts alone" in capsys.readouterr().out
    loaded = run_parameters(run).load()
    assert "vision" not in loaded
    for name in ("layers", "embed"):
        jax.tree.map(np.testing.assert_array_equal, loaded[name], params[name])


@pytest.mark.slow
def test_reward_resumes_exactly(make, tmp_path):
    config = make(RewardConfig, tmp_path / "reward", "pairs", checkpoint=KEEP_ALL)
    assert_resumes_exactly(config, tmp_path)


def test_a_classifier_learns_names_its_labels_and_predicts(make, tmp_path, capsys, monkeypatch):
    config = make(ClassifyConfig, tmp_path / "classify", "labels", training={"steps": 60, "eval_every": 20}, rate=1e-2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # it has no results yet, so is not finished
        patch.setattr("minimind_jax.stages.classify.evaluate_batches", killed)
        start(config)
    run = RunFolder(config.run)
    assert run.model.is_dir() and not is_exported(run)
    start(config)
    assert is_exported(run)
    results = json.loads((run.path / "results.json").read_text("utf-8"))
    assert results["accuracy"] > 0.9
    assert results["accuracy"] == pytest.approx(last(run.path, "val_accuracy"), abs=1e-6)
    assert (run.path / "confusion.png").stat().st_size > 5000
    assert "Held-out results" in run.report_file.read_text("utf-8")
    assert load_labels(run.model).names == ("birds", "cat", "dogs")
    texts = write_lines(tmp_path / "new.jsonl", [{"text": "dogs sat on a mat"}, {"text": "birds"}])
    assert predict(run.path, [texts], str(tmp_path / "out.jsonl"), top=2) == 2
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [answer["predicted"] for answer in answers] == ["dogs", "birds"]
    assert answers[0]["top"][0]["label"] == "dogs" and len(answers[0]["top"]) == 2


def test_a_classifier_is_transformers_own(make, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    exported = {"export_dtype": ClassifyConfig.export_dtype}  # float32: transformers computes in the type it finds
    run = RunFolder(start(make(ClassifyConfig, tmp_path / "classify", "csv", training={"steps": 12}, **exported)))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.model).eval()
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    assert model.config.id2label == {0: "birds", 1: "cat", 2: "dogs"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    texts = ["dogs", "the cat sat on a mat while dogs run over green hills", "birds sing 你好"]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(Scorer(str(run.path)).texts(texts), theirs, atol=1e-4)


@pytest.mark.slow
def test_labels_belong_to_the_run(make, files, tmp_path):
    """What the data says later changes no export, and is refused when the run goes on."""
    data = shutil.copy(files["labels"], tmp_path / "data.jsonl")
    config = make(ClassifyConfig, tmp_path / "classify", data, checkpoint=KEEP_ALL, lora=ADAPTERS)
    run = RunFolder(start(config))
    records = [json.loads(line) for line in open(data, encoding="utf-8")]
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=28))
    write_lines(data, [{**each, "label": each["label"].replace("cat", "zebra")} for each in records])
    with pytest.raises(UserError, match=r"other labels than .* was started with .new: 'zebra'; gone: 'cat'"):
        start(longer)
    write_lines(data, [{**each, "label": [each["label"]]} for each in records])
    with pytest.raises(UserError, match="any number of labels a text, and the run had one label a text"):
        start(longer)
    data.unlink()
    assert export_newest(run.path, tmp_path / "out", "float32") == 24
    assert load_labels(tmp_path / "out") == load_labels(run.model)
    assert load_labels(run.model) == (("birds", "cat", "dogs"), False, 64)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, load_file(run.model / "model.safetensors")[name], atol=1e-6, err_msg=name)
    run.labels_file.write_text(json.dumps({"names": ["dogs", "birds", "cat"], "several": False}))
    assert keep_labels(run, Labels(("birds", "cat", "dogs")), has_begun=True).names == ("dogs", "birds", "cat")
    shutil.rmtree(run.model)
    run.labels_file.unlink()
    with pytest.raises(UserError, match="earlier version and keeps no labels"):
        export_newest(run.path, tmp_path / "again")


def test_the_trained_length_goes_with_the_model(make, files, tmp_path, capsys, monkeypatch):
    """On the run, its model/, a converted copy and transformers' pipeline a long text has the same answer."""
    config = make(ClassifyConfig, tmp_path / "classify", "labels", data={"seq_len": 16}, training={"steps": 12})
    run = RunFolder(start(config))
    from_hf(run.model, tmp_path / "copy", "float32")
    long = "dogs " + "sat on a mat while birds " * 12
    texts = write_lines(tmp_path / "long.jsonl", [{"text": long, "tag": ["a", "b"]}, {"text": 'cat, "x"', "tag": None}])
    answers = []
    capsys.readouterr()
    for number, place in enumerate((run.path, run.model, tmp_path / "copy")):
        predict(place, [texts], str(tmp_path / f"{number}.jsonl"))
        answers.append((tmp_path / f"{number}.jsonl").read_text("utf-8"))
        assert "1 of 2 texts were longer than the 16 tokens that are read" in capsys.readouterr().err
    assert len(set(answers)) == 1
    predict(run.path, [texts], str(tmp_path / "table.csv"))
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [json.loads(line) for line in answers[0].splitlines()]
    assert [(row["text"], row["tag"]) for row in rows] == [(long, '["a", "b"]'), ('cat, "x"', "")]
    for row, answer in zip(rows, expected, strict=True):
        assert (row["predicted"], float(row["probability"])) == (answer["predicted"], answer["probability"])
    earlier = [{"text": "dogs\rsat", "predicted": "x", "a": 'q "r",\r\ns\r'}]
    predict(run.path, [write_lines(tmp_path / "earlier.jsonl", earlier)], str(tmp_path / "ends.csv"))
    assert "the earlier `predicted` is replaced (once)" in capsys.readouterr().err
    [row] = [record.value for record in iter_records([tmp_path / "ends.csv"])]
    assert (row["text"], row["a"]) == (earlier[0]["text"], earlier[0]["a"]) and row["predicted"] in ("birds", "dogs")
    gaps = write_lines(tmp_path / "gaps.jsonl", [{"text": "dogs"}] * 600 + [{"text": ""}])
    with pytest.raises(UserError, match=r"gaps.jsonl:601: text is empty"):
        predict(run.path, [gaps], str(tmp_path / "gaps.csv"))
    assert not list(tmp_path.glob("gaps.csv*"))  # refused before anything is answered
    (tmp_path / "lines.txt").write_text("dogs\ncat\n")
    assert predict(run.path, [str(tmp_path / "lines.txt")], str(tmp_path / "LINES.CSV")) == 1
    assert "lines.txt: read as one text" in capsys.readouterr().err
    assert (tmp_path / "LINES.CSV").read_text("utf-8").startswith("text,predicted,probability\n")
    with pytest.raises(ValueError, match="top is 0; it must be at least 1"):
        predict(run.path, [texts], top=0)
    lines = io.TextIOWrapper(
        io.BytesIO('\ufeffdogs 你\r\n\r\n{"text": "cat"}\r\n'.encode("utf-8")), "ascii", newline="\n"
    )
    monkeypatch.setattr("sys.stdin", lines)
    assert predict(run.path, [], str(tmp_path / "typed.jsonl")) == 2
    typed = [json.loads(line)["text"] for line in (tmp_path / "typed.jsonl").read_text("utf-8").splitlines()]
    assert typed == ["dogs 你", '{"text": "cat"}'] and "looks like JSON" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grün".encode("latin-1")), "utf-8"))
    with pytest.raises(UserError, match=r"standard input:1: not utf-8 text; .*--encoding"):
        predict(run.path, [])
    config_file = tmp_path / "copy" / "tokenizer_config.json"  # as an earlier version wrote it
    config_file.write_text(json.dumps({**json.loads(config_file.read_text("utf-8")), "model_max_length": 131072}))
    predict(tmp_path / "copy", [texts], str(tmp_path / "old.jsonl"))
    assert "does not say where longer texts were cut in its training" in capsys.readouterr().err
    for name in ("table.parquet", "table.xlsx", "table.csv.gz"):
        with pytest.raises(UserError, match="JSON lines are written"):
            predict(run.path, [texts], str(tmp_path / name))
    with pytest.raises(UserError, match="seq_len 1000 is above the model's context"):
        predict(run.path, [texts], seq_len=1000)
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("text-classification", model=str(run.model), device="cpu")
    theirs = pipeline([long], truncation=True)[0]
    assert theirs["label"] == expected[0]["predicted"]
    assert theirs["score"] == pytest.approx(expected[0]["probability"], abs=1e-5)


def test_several_labels(make, tmp_path):
    config = make(ClassifyConfig, tmp_path / "several", "several", training={"steps": 40}, rate=1e-2)
    run = RunFolder(start(config))
    assert load_labels(run.model).several
    assert json.loads((run.path / "results.json").read_text("utf-8"))["accuracy"] > 0.5
    texts = write_lines(tmp_path / "new.jsonl", [{"text": "dogs sat"}])
    predict(run.path, [texts], str(tmp_path / "out.jsonl"))
    answer = json.loads((tmp_path / "out.jsonl").read_text("utf-8"))
    assert set(answer["probabilities"]) == {"birds", "cat", "dogs"}


@pytest.mark.slow
def test_patience_ends_a_run_with_its_best_model(make, tmp_path):
    rng = random.Random(0)
    noise = [{"text": f"cat {n} dogs {rng.random()}", "label": rng.choice("ab")} for n in range(120)]
    training = {"steps": 400, "eval_every": 4, "patience": 2}
    file = write_lines(tmp_path / "noise.jsonl", noise)  # which can be learned by heart only
    config = make(ClassifyConfig, tmp_path / "patient", file, training=training, rate=1e-2)
    run = RunFolder(start(config))
    losses = {row["step"]: row["val_loss"] for row in rows_of(run.path) if row["step"] and "val_loss" in row}
    assert max(losses) < 400
    ordered = [losses[step] for step in sorted(losses)]
    assert len(ordered) - 1 - ordered.index(min(ordered)) == 2
    results = json.loads((run.path / "results.json").read_text("utf-8"))
    best = min(losses, key=losses.get)
    accuracy = next(row["val_accuracy"] for row in rows_of(run.path) if row["step"] == best and "val_accuracy" in row)
    assert results["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert start(config) == run.path


@pytest.mark.slow
def test_classify_resumes_exactly(make, tmp_path):
    config = make(ClassifyConfig, tmp_path / "classify", "labels", checkpoint=KEEP_ALL, lora=ADAPTERS)
    assert_resumes_exactly(config, tmp_path)


def test_class_weights_even_out_rare_classes(make, tmp_path):
    labels = [{"text": f"cat {n}", "label": "cat"} for n in range(90)] + [{"text": "dogs", "label": "dogs"}] * 10
    file = write_lines(tmp_path / "rare.jsonl", labels)
    for weights in ("none", "balanced"):
        config = make(
            ClassifyConfig, tmp_path / weights, file, classify=LabelConfig(class_weights=weights),
            data={"val_fraction": 0.0}, training={"steps": 1}, rate=0.0,
        )  # fmt: skip
        start(config)
    plain, balanced = (last(tmp_path / name, "loss") for name in ("none", "balanced"))
    assert plain == pytest.approx(balanced, abs=0.2) and plain != balanced


def test_labels_that_are_only_held_out_are_told(make, tmp_path, capsys):
    labels = [{"text": "cat", "label": "cat"}] * 30 + [{"text": name, "label": name} for name in "abcdefgh"]
    file = write_lines(tmp_path / "single.jsonl", labels)
    run = start(make(ClassifyConfig, tmp_path / "run", file, data={"val_fraction": 0.5}, training={"steps": 1}))
    rows = json.loads((run / "results.json").read_text("utf-8"))["classes"]
    alone = [row["label"] for row in rows if row["texts"] and row["label"] != "cat"]
    assert alone and f"{len(alone)} labels have no text to train on ({', '.join(alone)})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b"}], "missing field `label`"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 1.5}], "expected text or a whole number"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "text is empty"),
        ([{"phrase": "a", "label": "x"}], "expected a field `text`.*text_field"),
        ([{"text": "a", "label": "x"}] * 2, "only the label 'x'; a classifier needs at least two"),
    ],
)
def test_broken_labels_are_told(records, message, make, tmp_path):
    file = write_lines(tmp_path / "broken.jsonl", records)
    with pytest.raises(UserError, match=message):
        start(make(ClassifyConfig, tmp_path / "run", file))


def test_a_label_that_training_does_not_know_is_told(make, tmp_path):
    val = write_lines(tmp_path / "val.jsonl", [{"text": "a", "label": "mouse"}])
    with pytest.raises(UserError, match=r"val.jsonl:1: the label 'mouse' is not in the training data"):
        start(make(ClassifyConfig, tmp_path / "run", "labels", data={"val": (val,)}))
