"""Which stage, model and tokens are planned."""

import json

import pytest

from minimind_jax.config.sections import DataConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig, SFTConfig
from minimind_jax.errors import UserError
from minimind_jax.plan import inputs
from minimind_jax.plan.devices import find_device, parse_topology, target_config
from minimind_jax.plan.inputs import Planned, count_tokens, load_planned, planned_tokens


def test_a_stages_file_is_known_by_its_name_and_overrides_hold():
    planned = load_planned(["--config", "sft", "--model.preset", "minimind2-small", "--data.seq_len", "384"], None)
    assert planned.stage == "sft" and isinstance(planned.config, SFTConfig)
    assert planned.config.data.seq_len == 384 and planned.architecture.hidden_size == 512
    assert load_planned(["--model.preset", "qwen3-0.6b"], None).stage == "pretrain"
    assert load_planned(["--config", "lora"], None).stage == "sft"


def test_a_stage_of_a_pipeline_has_the_model_of_the_stage_before_it():
    planned = load_planned(["--config", "moe", "--training.accumulation_steps", "2"], "sft")
    assert planned.stage == "sft" and planned.config.data.seq_len == 768
    assert planned.config.training.accumulation_steps == 2
    assert planned.architecture.num_experts == 4 and not planned.note
    assert load_planned(["--config", "zero"], None).stage == "pretrain"


def test_a_start_that_is_not_there_is_said(tmp_path):
    planned = load_planned(["--config", "sft", "--init_from", str(tmp_path / "none")], None)
    assert "is not there yet" in planned.note and planned.architecture.hidden_size == 768


def test_settings_that_are_wrong_are_told_as_anywhere():
    with pytest.raises(UserError, match=r"unknown setting data.seqlen; did you mean data.seq_len"):
        load_planned(["--config", "pretrain", "--data.seqlen", "3"], None)
    with pytest.raises(UserError, match=r"unknown setting data.seqlen; did you mean data.seq_len"):
        load_planned(["--config", "zero", "--data.seqlen", "3"], None)


def write_texts(path, count):
    path.write_text("".join(json.dumps({"text": "a mat, a cat"}) + "\n" for _ in range(count)))
    return path


def test_tokens_are_given_set_or_guessed_from_the_size(tmp_path):
    file = write_texts(tmp_path / "text.jsonl", 100)
    config = PretrainConfig(data=DataConfig(cache_dir=str(tmp_path)), training=TrainingConfig(epochs=2))
    planned = Planned("pretrain", config, config.model.resolve(), "")
    assert planned_tokens(planned, [], 5).count == 5
    assert planned_tokens(planned, [], None) is None
    told = planned_tokens(planned, [str(file)], None)
    assert told.count == pytest.approx(2 * file.stat().st_size / inputs.BYTES_PER_TOKEN, rel=0.01)
    assert "guessed from the size" in told.source and "2 epochs" in told.source
    named = DataConfig(cache_dir=str(tmp_path), train=(str(tmp_path / "te*.jsonl"),))
    by_glob = planned._replace(config=PretrainConfig(data=named))
    assert planned_tokens(by_glob, [], None).count == pytest.approx(told.count / 2, abs=1)
    gone = planned._replace(config=PretrainConfig(data=DataConfig(train=(str(tmp_path / "not_yet.jsonl"),))))
    assert planned_tokens(gone, [], None) is None
    steps = planned._replace(config=PretrainConfig(training=TrainingConfig(steps=10)))
    assert planned_tokens(steps, [], None).count == 10 * 81920


def test_compressed_files_need_a_number(tmp_path):
    (tmp_path / "text.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"text.jsonl.gz: .* give --tokens N"):
        count_tokens([tmp_path / "text.jsonl.gz"], "text", PretrainConfig())


def test_devices_and_topologies():
    assert parse_topology(find_device("h100"), "x8").options["topology"] == "1x1x8"
    assert parse_topology(find_device("h100"), "16").options["topology"] == "1x2x8"
    assert parse_topology(find_device("tpu-v5e"), "4x4")[:2] == ("v5e:4x4", 16)
    assert parse_topology(find_device("tpu-v5e"), "1x1").options["chips_per_host_bounds"] == (1, 1, 1)
    assert parse_topology(find_device("tpu-v4"), "2x2x1")[:2] == ("v4:2x2x1", 4)
    assert "minor: 6" in target_config(find_device("rtx3090"))
    for device, topology in (("h100", "2x4"), ("h100", "0"), ("h100", "9"), ("tpu-v4", "2x4"), ("tpu-v5e", "8")):
        with pytest.raises(UserError, match=f"--topology {topology}"):
            parse_topology(find_device(device), topology)
    with pytest.raises(UserError, match="did you mean tpu-v5e"):
        find_device("v5e")


def test_images_are_counted_among_the_tokens_of_a_sample(tmp_path, world):
    pillow = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    pillow.new("RGB", (4, 4)).save(tmp_path / "dot.png")
    talk = [{"role": "user", "content": "<image> and?"}, {"role": "assistant", "content": "a dot"}]
    records = [
        {"conversations": talk, "image": "dot.png"},
        {"conversations": [{**talk[0], "content": "and?"}, talk[1]]},
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records * 20))
    tower = ["--vision.tower", "google/siglip2-base-patch32-256", "--training.epochs", "3"]
    start = ["--init_from", "none", "--tokenizer", str(world.folder / "tokenizer"), "--data.cache_dir", str(tmp_path)]
    told = planned_tokens(load_planned([*tower, *start], "vlm-sft"), [str(file)], None)
    assert told.images == 60 and told.count > 60 * 64
    (tmp_path / "talk.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="give --tokens N and --images N"):
        planned_tokens(load_planned([*tower, *start], "vlm-sft"), [str(tmp_path / "talk.parquet")], None)
