"""The stages of models that see: what they learn of drawn squares, what stays frozen, and what they refuse."""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from kills import STEPS_PER_KILL, check_same, finish, train_with_kills
from pairs import outputs, start_pair
from run_helpers import KEEP_ALL, assembled, assert_resumes_exactly, export_newest, rows_of, with_chats
from worlds import write_lines

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import LoRAConfig, OptimizerConfig, SeeingSampleConfig
from minimind_jax.config.stages import SeeingConfig, SFTConfig, VisionConfig, VLMPretrainConfig, VLMSFTConfig
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.hf_weights import hf_tensors
from minimind_jax.convert.load import load_merged
from minimind_jax.data.cache_folder import stored_caches
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import open_picture, read_image
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.load import load_engine
from minimind_jax.model.config import ComputeConfig, ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.image_rows import open_pictures
from minimind_jax.runs.parts import run_parameters
from minimind_jax.runs.samples import sampler
from minimind_jax.stages import STAGES, start
from minimind_jax.training.packed import check_same_data, data_record
from minimind_jax.training.run import RunFolder

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "yellow": (230, 220, 40)}
TOWER = TowerConfig(32, 48, 2, 2, 16, 8, resample=2)  # 4 tokens an image
TEXT = ModelConfig(
    vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip


def square(colour, rng, side=20):
    """A square of that colour somewhere on grey."""
    image = Image.new("RGB", (side, side), (128, 128, 128))
    x, y = rng.randrange(side - 12), rng.randrange(side - 12)
    image.paste(COLOURS[colour], (x, y, x + 12, y + 12))
    return image


@pytest.fixture(scope="module")
def seen(world, tmp_path_factory):
    """A folder with a text model, a tower, and squares.jsonl beside its pictures."""
    folder, rng = tmp_path_factory.mktemp("seen"), random.Random(0)
    tokenizer = Tokenizer.load(world.folder / "tokenizer")
    for name, vision in (("text", None), ("tower", Vision(TOWER, 12))):
        model = LanguageModel(dataclasses.replace(TEXT, vision=vision))
        save_hf(folder / name, model.config, jax.jit(model.init)(jax.random.key(0)), tokenizer, "float32")
    for name, count in (("squares", 64), ("others", 20)):
        records = []
        for n in range(count):
            colour = list(COLOURS)[n % 4]
            square(colour, rng).save(folder / f"{name}{n}.png")
            asked = rng.choice(["<image>\nwhich?", "which?<image>"])
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
            records.append({"conversations": talk, "image": f"{name}{n}.png"})
        if name == "others":  # one that trains as well as they do, and whose end is no answer
            records.append({**records[0], "conversations": [*talk, {"role": "user", "content": "why?"}]})
        write_lines(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def make(seen, world, tmp_path):
    def make(cls=VLMSFTConfig, run="run", train="all", steps=8, data=None, **changes):
        settings = {"log_every": 1, "batch_tokens": 384, "steps": steps, "eval_every": 0}
        data = {
            "train": (str(seen / "squares.jsonl"),), "seq_len": 96, "cache_dir": str(world.folder / "cache"),
            "tokenizer_workers": 1, "val_fraction": 0.0, **(data or {}),
        }  # fmt: skip
        config = cls(
            run=str(tmp_path / run),
            init_from=str(seen / "text"),
            export_dtype="float32",
            compute=ComputeConfig(scan_unroll=1),
            optimizer=OptimizerConfig(learning_rate=3e-3),
        )
        if isinstance(config, SeeingConfig):
            config = dataclasses.replace(config, vision=VisionConfig(tower=str(seen / "tower"), train=train))
        training = dataclasses.replace(config.training, **settings)
        made = dataclasses.replace(config, data=dataclasses.replace(config.data, **data), training=training)
        return dataclasses.replace(made, **changes)

    return make


def answers(folder, images):
    """The colour that a model says is likeliest, of each picture."""
    config, params = load_hf(folder)
    tokenizer, model = Tokenizer.load(folder), LanguageModel(config)
    marker = tokenizer.decode([config.vision.marker_id], skip_special_tokens=False)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": marker * config.vision.image_tokens + "\nwhich?"}])
    firsts = {name: tokenizer.encode(name)[0] for name in COLOURS}
    assert len(set(firsts.values())) == len(COLOURS)

    def content(image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    pixels = np.stack([read_image(content(image), TOWER, "drawn")[None] for image in images])
    batch = {"tokens": np.tile(prompt, (len(images), 1)), "pixels": pixels}
    batch["lengths"] = np.full(len(images), len(prompt))
    hidden = jax.jit(model.read_batch)(params, batch).hidden_BTD
    logits = np.asarray(model.logits(params, hidden[:, -1:]))[:, 0, list(firsts.values())]
    return [list(firsts)[n] for n in logits.argmax(axis=1)]


@pytest.mark.slow
def test_it_learns_colours_and_says_another_of_another_picture(make, seen, capsys):
    """The samples of the run, too: of its data, each with its own picture."""
    samples, val = SeeingSampleConfig(from_data=3, max_new_tokens=8), {"val": (str(seen / "others.jsonl"),)}
    run = RunFolder(start(make(train="tower", steps=120, data=val, samples=samples)))
    printed = capsys.readouterr().out
    assert "64 documents, 64 images," in printed
    assert "records that are not asked: 1, the first: " in printed and "others.jsonl:21: the last message" in printed
    [samples] = [row["samples"] for row in rows_of(run.path) if "samples" in row]
    engine, sampling = load_engine(str(run.model)), SamplingConfig(max_new_tokens=8, temperature=0.0)
    for n, sample in enumerate(samples):
        assert sample["prompt"] in (f"<others{n}.png>\nwhich?", f"which?<others{n}.png>")
        text = sample["prompt"].replace(f"<others{n}.png>", "<|image_pad|>" * 4)
        prompt = encode_prompt(engine.tokenizer, [{"role": "user", "content": text}])
        picture = open_picture(seen / f"others{n}.png", TOWER, "")
        assert sample["text"] == engine.generate([prompt], sampling, [[picture]])[0].text
    assert len(samples) == len({sample["text"] for sample in samples}) == 3
    check_results(run)
    rng = random.Random(1)
    truth = [name for name in COLOURS for _ in range(5)]
    found = answers(run.model, [square(name, rng) for name in truth])
    assert sum(a == b for a, b in zip(found, truth, strict=True)) >= 18


def check_results(run):
    """What the report says of the held-out squares: none is named before the run, most are after it, and with another
    square's picture only as many as have its colour."""
    said = run.report_file.read_text("utf-8").partition("## Held-out results")[2]
    shares = re.findall(r"(\d+) of 20, ", said)
    assert len(shares) == 3 and int(shares[0]) == 0 and int(shares[1]) >= 18 and int(shares[2]) <= 9
    before, after, shuffled = map(float, re.search(r"theirs \| (.+) \| (.+) \| (.+) \|", said).groups())
    assert after < before and after < shuffled / 2
    shown = re.findall(r"\| !\[\]\((pictures/\d+\.png)\) \| which\? \| (\w+) \| [^|]* \| (\w+) \|", said)
    assert len(shown) == 8 and sum(due == found for _, due, found in shown) >= 7
    for file, colour, _ in shown:
        middle = np.asarray(Image.open(run.path / file)).reshape(-1, 3)
        assert min(np.abs(middle.astype(int) - COLOURS[colour]).sum(axis=1)) < 60


def kept_and_changed(before, after):
    """Paths of the leaves that are the same bit for bit, and of those that are not; of layers each by itself."""
    sides = {True: set(), False: set()}

    def compare(path, old, new):
        names = tuple(entry.key for entry in path)
        if names[0] == "layers":
            for n, (a, b) in enumerate(zip(old, new, strict=True)):
                sides[bool((a == b).all())].add(f"layers.{n}")
        else:
            sides[bool((np.asarray(old) == new).all())].add(".".join(names[:2]))

    jax.tree_util.tree_map_with_path(compare, before, after)
    return sides[True], sides[False]


def trained_parts(config):
    """Of a run from its start to its end."""
    stage = next(kind.name for kind in STAGES.values() if kind.config is type(config))
    before = run_parameters(assembled(stage, config)).load()
    return kept_and_changed(before, load_hf(RunFolder(start(config)).model)[1])


@pytest.mark.slow
def test_a_run_resumes_exactly_and_what_is_not_trained_keeps_every_bit(make, tmp_path):
    config = make(train="ends", checkpoint=KEEP_ALL, data={"val_fraction": 0.1})
    kept, changed = trained_parts(config)
    assert changed == {"vision.projector", "layers.0", "layers.2"} and "vision.tower" in kept
    assert_resumes_exactly(config, tmp_path, step=4)
    assert any("val_loss" in row for row in rows_of(config.run))


@pytest.mark.slow
def test_features_made_before_train_as_pixels_do(make, tmp_path):
    """In another order of sums, so only nearly."""
    config = make(steps=4, data={"val_fraction": 0.1, "cache_dir": str(tmp_path / "cache")})
    plain = start(config)
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_features=True))
    cached = start(dataclasses.replace(cached, run=str(tmp_path / "cached")))
    kinds = [cache.kind for cache in stored_caches(tmp_path / "cache" / "tokens")]
    assert sorted(kinds) == ["features", "images"]
    ours, theirs = (rows_of(run) for run in (cached, plain))
    for key in ("loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(*([row[key] for row in rows if key in row] for rows in (ours, theirs)), rtol=1e-4)
    with pytest.raises(ValueError, match="is for a tower that stays as it is"):
        make(train="tower", data={"cache_features": True})
    with pytest.raises(ValueError, match="is for one rendering"):
        make(data={"cache_features": True, "redraw_each_epoch": True})


@pytest.mark.slow
def test_all_but_the_tower(make):
    words = {"layers.0", "layers.1", "layers.2", "embed.embedding", "norm.scale"}
    assert trained_parts(make(train="all", steps=2)) == ({"vision.tower"}, {"vision.projector", *words})


def test_a_projector_is_trained_alone_and_words_without_it(make, world):
    first = make(VLMPretrainConfig, train="projector", steps=2)
    assert trained_parts(first)[1] == {"vision.projector"}
    with pytest.raises(UserError, match=r"sees already; leave vision\.tower out"):
        start(make(run="third", init_from=first.run))
    words = with_chats(make(SFTConfig, run="words", init_from=first.run, steps=2), world)
    assert trained_parts(words)[0] == {"vision.tower", "vision.projector"}


@pytest.mark.slow
def test_adapters_over_a_model_that_sees(make, tmp_path):
    first = RunFolder(start(make(VLMPretrainConfig, train="projector", steps=2)))
    own = {"init_from": str(first.path), "vision": VisionConfig(), "checkpoint": KEEP_ALL}
    run = RunFolder(start(make(run="lora", lora=LoRAConfig(rank=2), **own)))
    before, after = load_hf(first.model)[1], load_merged(run.model)[1]
    kept, changed = kept_and_changed(before, after)
    assert changed == {"layers.0", "layers.1", "layers.2"} and "vision.projector" in kept
    assert export_newest(run.path, tmp_path / "whole", "float32") == 8
    whole = load_hf(tmp_path / "whole")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, after)
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    peft = pytest.importorskip("peft", reason="the comparison needs peft")
    base = transformers.LlavaForConditionalGeneration.from_pretrained(first.model)
    theirs = peft.PeftModel.from_pretrained(base, run.model).merge_and_unload().state_dict()
    ours = hf_tensors(load_merged(run.model)[0], after)
    layers = {
        name.replace("model.", "model.language_model.", 1): ours[name] for name in ours if "model.layers." in name
    }
    assert len(layers) == 3 * 11
    for name, tensor in layers.items():
        np.testing.assert_allclose(theirs[name].numpy(), tensor, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True], ids=["pixels", "features"])
def test_runs_that_are_killed_while_pictures_are_read(make, processes, tmp_path, features):
    """Threads read those of the steps ahead when the kill comes; each start has another number of them."""
    data = {"val_fraction": 0.1, "cache_features": features, "cache_dir": str(tmp_path / "cache")}
    whole, killed = (make(run=name, steps=4 * STEPS_PER_KILL, data=data) for name in ("whole", "killed"))
    finish(processes("vlm-sft", whole), whole)
    train_with_kills(processes, "vlm-sft", killed, kills=3, variants=((1, 2), (1, 0), (1, 4)))
    check_same(RunFolder(whole.run), RunFolder(killed.run))


@pytest.mark.slow
def test_two_processes_each_read_the_pictures_of_their_own_rows(make, tmp_path):
    one = RunFolder(start(make(train="ends", data={"seq_len": 48})))
    settings = ["vlm-sft", "--config", one.config_file, "--run", tmp_path / "pair"]
    first, _ = outputs(start_pair(tmp_path, *map(str, settings)), 0)
    assert "2 x cpu" in first
    losses = [[row["loss"] for row in rows_of(run) if "loss" in row] for run in (one.path, tmp_path / "pair")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    tensors = [load_hf(folder / "model")[1] for folder in (one.path, tmp_path / "pair")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *tensors)


@pytest.mark.slow
def test_eight_devices_train_as_one(make, tmp_path):
    config = make(train="ends", data={"seq_len": 48})  # 8 rows
    one, settings = RunFolder(start(config)), ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--run", tmp_path / "eight"]
    command = [sys.executable, "-m", "minimind_jax", "vlm-sft", "--config", one.config_file, *settings]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stdout
    losses = [[row["loss"] for row in rows_of(run) if "loss" in row] for run in (one.path, tmp_path / "eight")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    tensors = [load_hf(folder / "model")[1] for folder in (one.path, tmp_path / "eight")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *tensors)


def test_a_picture_that_is_replaced_is_other_data(make, seen, tmp_path):
    files = [shutil.copy(seen / f"squares{n}.png", tmp_path) for n in range(4)]
    rows = [json.loads(line) for line in (seen / "squares.jsonl").read_text().splitlines()[:4]]
    run = assembled("vlm-sft", make(data={"train": (str(write_lines(tmp_path / "few.jsonl", rows)),)}))
    before, again = (data_record(open_pictures(run, 4, False)[0]) for _ in range(2))
    assert check_same_data(before, again) is None
    shutil.copy2(files[1], files[0])
    with pytest.raises(UserError, match=r"the data has changed since the checkpoint \(pictures "):
        check_same_data(before, data_record(open_pictures(run, 4, False)[0]))


@pytest.mark.slow
def test_a_run_that_never_saw_what_it_is_asked_behind_says_so(make, seen, capsys):
    others = [json.loads(line) for line in (seen / "others.jsonl").read_text().splitlines()[:2]]
    few = str(write_lines(seen / "two.jsonl", others))
    start(make(steps=1, data={"val": (few,), "empty_think_removal": 1.0}))
    assert (
        "asked about behind an empty thought, as in chats, and this run has learned without" in capsys.readouterr().out
    )


def test_samples_show_pictures_that_are_named(make, seen):
    def sample(*prompts, images=("red.png", "blue.png")):
        samples = SeeingSampleConfig(prompts, images=[str(seen / name) for name in images], max_new_tokens=3)
        run = assembled("vlm-sft", make(samples=samples))
        return sampler(run)(run_parameters(run).load()), run

    for name in ("red", "blue"):
        square(name, random.Random(0)).save(seen / f"{name}.png")
    written, run = sample("which?", "<image> or <image>?")
    assert [prompt for prompt, _ in written] == ["<red.png>\n<blue.png>\nwhich?", "<red.png> or <blue.png>?"]
    marker = "<|image_pad|>" * 4
    asked = [f"{marker}\n{marker}\nwhich?", f"{marker} or {marker}?"]
    prompts = [encode_prompt(run.tokenizer, [{"role": "user", "content": text}]) for text in asked]
    pictures = [open_picture(seen / f"{name}.png", TOWER, "") for name in ("red", "blue")]
    engine = Engine(run.model, run_parameters(run).load(), run.tokenizer)
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.0)
    assert [text for _, text in written] == [a.text for a in engine.generate(prompts, sampling, [pictures] * 2)]
    for prompt, images, said in (
        ("<image>?", ("red.png", "blue.png"), "samples.prompts: 2 pictures, and 1 times <image>"),
        ("which?", ("none.png",), "samples.images: the picture .*none.png cannot be read: No such file"),
        (f"{marker}which?", (), "samples.prompts: the prompt has 4 markers of pictures"),
    ):
        with pytest.raises(UserError, match=said):
            sample(prompt, images=images)


def test_data_without_a_picture_is_told_and_refused_where_only_they_teach(make, seen, world, capsys):
    words = {"train": (str(world.folder / "chat.jsonl"),)}
    with pytest.raises(
        UserError, match=r"no conversation that is trained on shows a picture .* learns from pictures alone"
    ):
        start(make(VLMPretrainConfig, train="projector", data=words))
    STAGES["vlm-sft"].load()(assembled("vlm-sft", make(train="ends", data=words)))
    assert (
        "shows a picture (`image`, `images`, `image_bytes` or parts of a message); this run trains on texts alone"
        in (capsys.readouterr().out)
    )


def test_what_cannot_see_is_refused(make, seen):
    for changes, said in (
        ({"vision": VisionConfig()}, r"a model of texts: give --vision\.tower"),
        ({"lora": LoRAConfig(rank=2)}, "a new projector, which lora.rank would not train"),
        ({"data": {"images_per_row": 1, "seq_len": 4}}, "nothing is trained"),
    ):
        with pytest.raises(UserError, match=said):
            start(make(**changes))
    vision = make().vision
    words = {"tower": str(seen / "text")}, r"^\S*config\.json: the tower's model_type is 'qwen3'"
    for change, said in (words, ({"marker": "<no>"}, "is no token of"), ({"pixel_shuffle": 3}, "does not divide")):
        with pytest.raises(UserError, match=said):
            start(make(vision=dataclasses.replace(vision, **change)))
