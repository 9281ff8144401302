"""The stage classify of pictures: what it learns of drawn shapes, its cache of features, and what it refuses."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from run_helpers import last

from minimind_jax.config.classify import ClassifyConfig, SightConfig
from minimind_jax.config.sections import FilesConfig, LoopConfig, OptimizerConfig
from minimind_jax.config.tools import PredictConfig
from minimind_jax.convert.hf import Labels, save_hf
from minimind_jax.evaluate.score_command import predict as run_predict
from minimind_jax.inference.score import PictureScorer
from minimind_jax.model.config import TowerConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.picture_model import PictureModel
from minimind_jax.model.vision import init_vision
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
ImageDraw = pytest.importorskip("PIL.ImageDraw", reason="pictures need Pillow")

TOWER = TowerConfig(32, 48, 2, 2, 16, 4, resample=2)
COLOURS = {"红": (220, 30, 30), "blue": (40, 60, 230)}
KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in ("disc", "square")]


def drawn(kind, rng):
    """A disc or a square of that colour somewhere on grey."""
    colour, shape = kind.split()
    image, radius = Image.new("RGB", (16, 16), (128, 128, 128)), 5
    x, y = rng.randrange(radius, 16 - radius), rng.randrange(radius, 16 - radius)
    draw = ImageDraw.Draw(image)
    place = [x - radius, y - radius, x + radius, y + radius]
    (draw.ellipse if shape == "disc" else draw.rectangle)(place, fill=COLOURS[colour])
    return image


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder with a tower, and pictures in folders named after their labels, beside files that are none."""
    folder, rng = tmp_path_factory.mktemp("shapes"), random.Random(0)
    tower = init_vision(PictureModel(TOWER).vision, 1, 0.1, jax.random.key(0))["tower"]
    params = {"vision": {"tower": tower}, **init_head(jax.random.key(1), 32, 2, bias=True)}
    save_hf(folder / "tower", TOWER, params, None, "float32", labels=Labels(("a", "b")))
    for n in range(160):
        place = folder / "my photos" / KINDS[n % 4]
        place.mkdir(parents=True, exist_ok=True)
        drawn(KINDS[n % 4], rng).save(place / f"{n} [new].{('png', 'PNG', 'bmp')[n % 3]}")
    for name in (".DS_Store", "Thumbs.db", "README.md"):
        (folder / "my photos" / name).write_bytes(b"?")
    return folder


def settings(shapes, folder, train="head", data=None, training=None, **changes):
    loop = {"log_every": 20, "batch_tokens": 16, "eval_rows": 0, **(training or {"steps": 8, "eval_every": 4})}
    files = {
        "train": (str(shapes / "my photos"),), "val_fraction": 0.2, "tokenizer_workers": 1, "seq_len": 4,
        "cache_dir": str(folder / "cache"), **(data or {}),
    }  # fmt: skip
    config = ClassifyConfig(
        run=str(folder / "run"),
        vision=SightConfig(str(shapes / "tower"), train),
        data=FilesConfig(**files),
        training=LoopConfig(**loop),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", final_fraction=0.0),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return RunFolder(start(settings(shapes, folder, train="tower", training={"steps": 200, "eval_every": 100})))


def predicted(model, output, *files, **changes):
    run_predict(PredictConfig(model=str(model), input=tuple(map(str, files)), output=str(output), **changes))
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_it_learns_shapes_and_tells_them_of_new_pictures(trained, tmp_path):
    assert last(trained.path, "val_accuracy") > 0.9
    found = json.loads((trained.path / "results.json").read_text("utf-8"))
    assert found["texts"] == 32 and found["accuracy"] > 0.9
    assert "32 pictures: accuracy" in trained.results_file.read_text("utf-8")
    rng, truth = random.Random(1), KINDS * 5
    for n, kind in enumerate(truth):
        drawn(kind, rng).save(tmp_path / f"{n:02} (1).JPG", quality=95, subsampling=0)
    rows = predicted(trained.path, tmp_path / "answers.jsonl", tmp_path, top=2)
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    assert sum(row["predicted"] == kind for row, kind in zip(rows, truth, strict=True)) >= 18
    assert all("label" not in row and len(row["top"]) == 2 for row in rows)


def test_transformers_tells_the_same_of_the_same_pictures(trained, shapes, tmp_path):
    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    model, info = transformers.SiglipForImageClassification.from_pretrained(
        trained.model, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(info.values()), info
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(pixels / np.float32(127.5) - 1).permute(0, 3, 1, 2)).logits.numpy()
    scorer = PictureScorer(str(trained.path))
    np.testing.assert_allclose(scorer.pixels(list(pixels)), theirs, atol=1e-4)
    assert model.config.id2label == dict(enumerate(sorted(KINDS)))
    picture = sorted((shapes / "my photos" / KINDS[0]).iterdir())[0]
    pipeline = transformers.pipeline("image-classification", model=str(trained.model))
    theirs = pipeline(Image.open(picture).convert("RGB"), top_k=4)
    (ours,) = predicted(trained.path, tmp_path / "one.jsonl", picture, top=4)
    assert [each["label"] for each in theirs] == [each["label"] for each in ours["top"]]
    np.testing.assert_allclose(
        [each["score"] for each in theirs], [each["probability"] for each in ours["top"]], atol=1e-5
    )
