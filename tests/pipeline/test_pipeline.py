"""The pipeline: stages tied together, done ones skipped, changes told; with the real stages on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from minimind_jax.config.classify import ClassifyConfig
from minimind_jax.config.sections import DataConfig
from minimind_jax.config.settings import config_names, find_config
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.pipeline import check
from minimind_jax.pipeline.read import Stage, load_pipeline
from minimind_jax.pipeline.run import _changes, run_pipeline
from minimind_jax.training.defaults import with_values
from minimind_jax.training.run import RunFolder

TINY = {
    "name": "tiny",
    "shared": {"seed": 3, "data.seq_len": 32, "training.batch_tokens": 128, "data.cache_dir": "cache"},
    "stages": [
        {"tokenizer": {"data": ["text.jsonl", "chats.jsonl"], "vocab_size": 400}},
        {
            "pretrain": {
                "model": {
                    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 400},
                    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
                },
                "data": {"train": ["text.jsonl"], "val_fraction": 0.2},
                "training": {"steps": 3},
            }
        },
        {"sft": {"data": {"train": ["chats.jsonl"], "val_fraction": 0.0}, "training": {"steps": 2}}},
    ],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a little data, in which `write(pipeline)` writes pipe.yaml."""
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"The {animal} sleeps {n} hours."} for n in range(12) for animal in ("cat", "dog", "owl")]
    chats = [
        {"conversations": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(12)
    ]
    for name, records in (("text", texts), ("chats", chats)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def write(pipeline=TINY):
        Path("pipe.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
        return ["--config", "pipe.yaml"]

    return write


def refused(write, pipeline, *arguments):
    with pytest.raises(UserError) as caught:
        load_pipeline([*write(pipeline), *arguments])
    return str(caught.value)


def test_stages_are_tied_together_and_shared_settings_reach_those_that_have_them(workplace):
    tokenizer, pretrain, sft = (stage.config for stage in load_pipeline(workplace()))
    assert tokenizer.output == pretrain.tokenizer == "runs/tiny/tokenizer"
    assert (pretrain.run, sft.run, sft.init_from) == ("runs/tiny/pretrain", "runs/tiny/sft", "runs/tiny/pretrain")
    assert pretrain.seed == sft.seed == 3 and pretrain.data.seq_len == sft.data.seq_len == 32
    assert sft.data.packing == "best_fit" and pretrain.data.packing == "concat"


def test_arguments_win_over_the_file(workplace):
    arguments = ["--name", "other", "--shared.seed", "9", "--sft.training.steps", "7", "--sft.init_from", "elsewhere"]
    _, pretrain, sft = (stage.config for stage in load_pipeline([*workplace(), *arguments]))
    assert (pretrain.seed, pretrain.run, pretrain.training.steps) == (9, "runs/other/pretrain", 3)
    assert (sft.training.steps, sft.init_from) == (7, "elsewhere")


def test_a_stage_may_be_only_a_name(workplace):
    assert [stage.name for stage in load_pipeline(workplace({"stages": ["pretrain", {"sft": None}]}))] == [
        "pretrain",
        "sft",
    ]


@pytest.mark.parametrize(
    "pipeline, arguments, text",
    [
        ({**TINY, "steps": []}, [], "unknown key steps; a pipeline has name, shared and stages"),
        ({"name": "x"}, [], "is not a pipeline"),
        ({"stages": ["pretrian"]}, [], "pipe.yaml:2: unknown stage pretrian; did you mean pretrain?"),
        ({"stages": [{"sft": {}, "pretrain": {}}]}, [], "a stage is one key with its settings under it"),
        ({"stages": [{"pretrain": {"sed": 1}}]}, [], "pipe.yaml:3: unknown setting sed; did you mean seed?"),
        ({"shared": {"modl.preset": "x"}, "stages": ["sft"]}, [], "did you mean model.preset?"),
        ({"stages": ["sft", "sft"]}, [], "two stages write to runs/pipe/sft"),
        (TINY, ["--sft.training.stepz", "3"], "unknown setting training.stepz; did you mean training.steps?"),
        (TINY, ["--stf.training.steps", "3"], "unknown setting stf.training.steps; did you mean sft.training.steps?"),
        (TINY, ["--seed", "3"], "unknown setting seed; did you mean"),
    ],
)
def test_mistakes_name_place_and_nearest(workplace, pipeline, arguments, text):
    assert text in refused(workplace, pipeline, *arguments)


def test_runs_skips_and_tells_changes(workplace, capsys):
    arguments = workplace()
    run_pipeline(load_pipeline(arguments))
    first = capsys.readouterr().out
    assert "[1/3] tokenizer: runs/tiny/tokenizer" in first and "done, in" not in first
    assert Path("runs/tiny/sft/model/model.safetensors").is_file()
    written = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}

    run_pipeline(load_pipeline(arguments))
    second = capsys.readouterr().out
    assert second.splitlines() == [
        f"[{number}/3] {name}: done, in runs/tiny/{name}"
        for number, name in enumerate(("tokenizer", "pretrain", "sft"), 1)
    ]
    assert written == {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}

    changed = ["--pretrain.training.steps", "5", "--tokenizer.vocab_size", "350", "--shared.resume", "never"]
    run_pipeline(load_pipeline([*arguments, *changed]))
    told = capsys.readouterr().out
    assert "its settings have changed since: training.steps 3 -> 5\n" in told and "vocab_size 400 -> 350\n" in told
    assert told.count("it is kept as it is; to make it anew, remove runs/tiny/") == 2

    shutil.rmtree("runs/tiny/pretrain")
    run_pipeline(load_pipeline(arguments))
    again = capsys.readouterr().out
    assert "[2/3] pretrain: runs/tiny/pretrain" in again and "it was made before this pretrain" in again


def test_goes_on_where_it_was_cut_off(workplace, capsys):
    """A run without its exported model is not done: the pipeline resumes it from its checkpoint."""
    arguments = workplace()
    run_pipeline(load_pipeline(arguments))
    metrics = Path("runs/tiny/sft/metrics.jsonl")
    rows = metrics.read_text().splitlines()
    metrics.write_text("".join(f"{row}\n" for row in rows[:-1]))  # the last row says that the model was written
    shutil.rmtree("runs/tiny/sft/model")
    capsys.readouterr()
    run_pipeline(load_pipeline(arguments))
    told = capsys.readouterr().out
    assert "[2/3] pretrain: done" in told and "[3/3] sft: runs/tiny/sft" in told and "checkpoint of step 2" in told
    assert Path("runs/tiny/sft/model/config.json").is_file()


@pytest.mark.parametrize("name", config_names())
def test_every_config_that_comes_with_the_package_is_valid(name, tmp_path, monkeypatch):
    from minimind_jax.config.settings import load_settings
    from minimind_jax.stages import STAGES

    others = {"lora": "sft", "cispo": "grpo", "dapo": "grpo", "grpo_minimind": "grpo",
              "classify_pictures": "classify", "vlm_nanovlm": "vlm-sft"}  # fmt: skip
    stage = others.get(name, name.replace("_", "-"))
    if stage in STAGES:
        load_settings(STAGES[stage].config, ["--config", name])
    else:
        stages = load_pipeline(["--config", name])
        assert [stage.name for stage in stages] == ["tokenizer", "pretrain", "sft"]
    assert f"--config {name}" in find_config(name).read_text(), "the comment of a config gives its command"


@pytest.mark.parametrize(
    "changes, said",
    [
        (["--sft.data.train", "chat.jsonl"], "stage sft: chat.jsonl: no such file"),
        (["--sft.data.train", "text.jsonl"], "stage sft: text.jsonl:1: "),
        (["--sft.data.val", "nothing.jsonl"], "stage sft: nothing.jsonl: no such file"),
        (["--sft.init_from", "elsewhere"], "stage sft: init_from 'elsewhere' is neither"),
        (["--sft.lora.rank", "4", "--sft.lora.targets", "q_prj"], "stage sft: lora: 'q_prj' is no projection"),
        (["--sft.model.hidden_size", "64"], "stage sft: model.hidden_size is 64, but the model runs/tiny/pretrain"),
        (["--sft.data.seq_len", "512", "--sft.training.batch_tokens", "512"], "stage sft: data.seq_len 512 is above"),
        (["--sft.optimizer.warmup_steps", "2"], "stage sft: optimizer.warmup_steps 2 is not below the 2 steps"),
        (["--sft.training.patience", "2"], "stage sft: training.patience needs validation"),
        (["--sft.resume", "must"], "stage sft: resume=must"),
        (["--tokenizer.vocab_size", "500"], "stage pretrain: its tokenizer has 500 tokens, more than the model's"),
        (["--tokenizer.data", "txt.jsonl"], "stage tokenizer: txt.jsonl: no such file"),
    ],
)
def test_a_mistake_in_any_stage_ends_the_pipeline_before_the_first_one_trains(workplace, changes, said):
    stages = load_pipeline([*workplace(), *changes])
    with pytest.raises(UserError) as caught:
        run_pipeline(stages)
    assert said in str(caught.value)
    assert not Path("runs").exists()


def test_a_broken_record_of_a_later_stage_is_told_while_an_earlier_one_runs(workplace, monkeypatch):
    arguments = workplace()
    lines = Path("chats.jsonl").read_text().splitlines()
    Path("chats.jsonl").write_text("\n".join([*lines * 20, '{"conversations": []}']) + "\n")
    stages = load_pipeline([*arguments, "--tokenizer.data", "text.jsonl"])
    check.check_stages(stages)  # a sample of the first records is as it should be
    said = []
    monkeypatch.setattr(check, "announce", said.append)
    check.watch_records(stages[2:]).join()
    assert "stage sft will not start: " in said[0] and "chats.jsonl:241: " in said[0]
    skipping = load_pipeline([*arguments, "--tokenizer.data", "text.jsonl", "--sft.data.on_error", "skip"])
    check.watch_records(skipping[2:]).join()
    assert len(said) == 1


def test_a_tokenizer_without_files_learns_from_those_of_the_other_stages(workplace):
    pipeline = {**TINY, "stages": [{"tokenizer": {"vocab_size": 400}}, *TINY["stages"][1:]]}
    tokenizer, *_ = load_pipeline([*workplace(pipeline), "--sft.data.train", "own.jsonl"])
    assert tokenizer.config.data == ("text.jsonl", "own.jsonl")
    demo, *_ = load_pipeline(
        ["--config", "quickstart", "--pretrain.data.train", "a.txt", "--sft.data.train", "b.jsonl"]
    )
    assert demo.config.data == ("a.txt", "b.jsonl")


def test_a_pipelines_folder_means_its_last_stage_and_changed_data_is_told(workplace, capsys):
    arguments = workplace()
    stages = load_pipeline(arguments)
    run_pipeline(stages)
    for name in ("tiny", "runs/tiny", "runs/tiny/"):
        assert resolve_model_folder(name) == Path("runs/tiny/sft/model")
    with pytest.raises(UserError, match="runs/tiny holds the runs of a pipeline; choose another run name"):
        RunFolder(Path("runs/tiny")).check_resume("auto")
    for name in ("tiny/pretrain", "tiny/sft/model"):
        with pytest.raises(UserError, match=f"runs/{name} is a run or a model.* --name"):
            run_pipeline(load_pipeline([*arguments, "--name", name]))
    with open("chats.jsonl", "a") as file:
        file.write(json.dumps({"conversations": [{"role": role, "content": "Hi"} for role in ("user", "assistant")]}))
    capsys.readouterr()
    run_pipeline(load_pipeline(arguments))
    told = capsys.readouterr().out
    assert told.count("changed since: the content of data.train") == 1 and "remove runs/tiny/sft" in told


def test_a_finished_classifier_is_told_to_have_changed_only_where_it_has(tmp_path):
    config = ClassifyConfig(
        run=str(tmp_path / "labels"), init_from="base", data=DataConfig(train=("labels.csv",), seq_len=256)
    )
    values = {"training.epochs": 27.0, "training.batch_tokens": 256, "training.eval_every": 40}
    values |= {"optimizer.learning_rate": 1e-3, "data.val_fraction": 0.1}
    run = RunFolder(config.run).create()
    run.asked = dict.fromkeys(values)
    run.write_config(with_values(config, values))
    run.write_environment({"stage": "classify"})
    run.metrics_file.write_text('{"step": 1, "loss": 1.0}\n')
    assert _changes(Stage("classify", config)) == []
    faster = with_values(config, {"optimizer.learning_rate": 1e-2})
    assert _changes(Stage("classify", faster)) == ["optimizer.learning_rate 0.001 -> 0.01"]
