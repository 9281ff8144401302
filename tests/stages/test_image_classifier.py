"""The stage classify of pictures: what it learns of drawn shapes, its cache of features, and what it refuses."""

import dataclasses
import gc
import io
import json
import random
import shutil

import jax
import numpy as np
import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, export_newest, last
from worlds import write_lines

from minimind_jax.config.classify import ClassifyConfig, ClassifyVisionConfig, LabelConfig
from minimind_jax.config.sections import FilesConfig, LoopConfig, OptimizerConfig
from minimind_jax.config.tools import PredictConfig
from minimind_jax.convert.hf import Labels, load_labels, save_hf
from minimind_jax.convert.hf_image_classifier import load_picture_classifier
from minimind_jax.data import feature_store, pixels
from minimind_jax.data.cache_folder import cache_root, remove_cache, stored_caches
from minimind_jax.data.jsonl import expand_paths
from minimind_jax.errors import UserError
from minimind_jax.evaluate.score_command import predict as run_predict
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.score import PictureScorer, Scorer
from minimind_jax.model.config import TowerConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.image_model import ImageModel
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
    tower = init_vision(ImageModel(TOWER).vision, 1, 0.1, jax.random.key(0))["tower"]
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
        vision=ClassifyVisionConfig(str(shapes / "tower"), train),
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


def stored(config):
    return {cache.kind: cache for cache in stored_caches(cache_root(config.data))}


@pytest.mark.slow
def test_a_frozen_tower_looks_once_at_every_picture(shapes, tmp_path, monkeypatch):
    looked = []
    shown = pixels.read_image
    monkeypatch.setattr(pixels, "read_image", lambda *given: looked.append(given[2]) or shown(*given))
    copy = shutil.copytree(shapes / "my photos", tmp_path / "photos")
    config = settings(shapes, tmp_path, data={"train": (str(copy),)})
    first = RunFolder(start(config))
    count = len({file.read_bytes() for file in copy.glob("*/*")})  # of which some are drawn twice
    assert len(looked) == count and stored(config)["features"].size > count * TOWER.hidden_size * 4
    looked.clear()
    again = RunFolder(start(dataclasses.replace(config, run=str(tmp_path / "again"))))
    assert not looked
    assert (again.model / "model.safetensors").read_bytes() == (first.model / "model.safetensors").read_bytes()
    changed, other = sorted((copy / KINDS[0]).iterdir())[:2]  # with its time: only the bytes tell
    shutil.copy2(other, changed)
    drawn(KINDS[0], random.Random(7)).save(copy / KINDS[0] / "newest.png")
    start(dataclasses.replace(config, run=str(tmp_path / "changed")))
    assert len(looked) == 1  # the copied one is another's
    gc.collect()  # of the runs, which hold their caches
    assert all(remove_cache(cache) for cache in stored_caches(cache_root(config.data)) if cache.kind == "features")


def test_what_a_store_holds_when_it_is_cut_off_or_full(shapes, tmp_path, monkeypatch):
    made = []

    def store():
        files = [shapes / "tower" / "model.safetensors"]
        return feature_store.FeatureStore(tmp_path, files, {"a": 1}, (2,), np.float32)

    def look(numbers, fail_at=None):
        for number in numbers:
            if number == fail_at:
                raise KeyboardInterrupt
            made.append(number)
            yield np.full((1, 2), number, np.float32)

    names = [bytes([n] * 16) for n in range(6)]
    with pytest.raises(KeyboardInterrupt):
        store().fill(names, lambda numbers: look(numbers, fail_at=3))
    with open(next(tmp_path.glob("*/features.bin")), "ab") as file:
        file.write(b"half")
    found = store()
    rows = found.fill([*names, names[2]], look)
    assert made == [0, 1, 2, 3, 4, 5] and rows.tolist() == [0, 1, 2, 3, 4, 5, 2]
    np.testing.assert_array_equal(found.rows[rows][:, 0], [0, 1, 2, 3, 4, 5, 2])
    monkeypatch.setattr(feature_store, "MOST_BYTES", 7 * 8)
    more = store()
    rows = more.fill([names[5], b"x" * 16, b"y" * 16], look)  # it begins anew, and who reads the old one goes on
    np.testing.assert_array_equal(more.rows[rows][:, 0], [0, 1, 2])
    np.testing.assert_array_equal(found.rows[:, 0], range(6))
    with pytest.raises(UserError, match=r"8 pictures takes 64 bytes, .* has room for 56 bytes"):
        store().fill([bytes([100 + n] * 16) for n in range(8)], look)


def test_a_run_resumes_exactly(shapes, tmp_path):
    config = settings(shapes, tmp_path, checkpoint=KEEP_ALL, training={"steps": 8, "eval_every": 4, "patience": 3})
    assert_resumes_exactly(config, tmp_path, step=4)
    assert export_newest(config.run, tmp_path / "exported") == 8
    ours, theirs = (load_picture_classifier(f)[1] for f in (RunFolder(config.run).model, tmp_path / "exported"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    tower = load_picture_classifier(shapes / "tower")[1]["vision"]
    jax.tree.map(np.testing.assert_array_equal, ours["vision"], tower)
    picture = next((shapes / "my photos" / KINDS[1]).iterdir())
    other = dataclasses.replace(config, vision=ClassifyVisionConfig(str(shapes / "tower"), "tower"), resume="auto")
    with pytest.raises(UserError, match=r"vision\.train head -> tower"):
        start(other)
    assert picture.exists()


def test_a_run_does_not_go_on_with_other_pictures(shapes, tmp_path):
    rows = [
        {"image": str(file), "label": file.parent.name} for file in sorted((shapes / "my photos").glob("*/*"))[::20]
    ]
    rows[0]["image"] = str(shutil.copy(rows[0]["image"], tmp_path / "own.png"))
    data = {"train": (str(write_lines(tmp_path / "rows.jsonl", rows)),), "val_fraction": 0.0}
    config = settings(shapes, tmp_path, data=data, training={"steps": 2, "batch_tokens": 4})
    start(config)
    shutil.copy(rows[1]["image"], tmp_path / "own.png")  # the table that names it is the same
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=3))
    with pytest.raises(UserError, match=r"the data has changed since the checkpoint \(pictures "):
        start(longer)


@pytest.mark.slow
def test_a_run_that_trains_its_tower_resumes_exactly(shapes, tmp_path):
    assert_resumes_exactly(settings(shapes, tmp_path, train="tower", checkpoint=KEEP_ALL), tmp_path, step=4)


def content(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_records_of_every_form_and_several_labels(shapes, trained, tmp_path, capsys):
    rng, kinds = random.Random(3), KINDS * 2
    for n, kind in enumerate(kinds):
        drawn(kind, rng).save(tmp_path / f"{n} [a].png")
    rows = [{"image": f"{n} [a].png", "label": kind, "shop": 1} for n, kind in enumerate(kinds)]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    cells = "".join(f"{row['image']},{row['label']}\n" for row in rows)
    (tmp_path / "a.csv").write_text(f"file_name,label\n{cells}", "utf-8")
    files = [lines, tmp_path / "a.csv", tmp_path / "a.parquet"]
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    table = [{"image": {"bytes": content(drawn(r["label"], rng)), "path": None}, "label": r["label"]} for r in rows]
    table[0]["image"]["bytes"] = (tmp_path / rows[0]["image"]).read_bytes()
    parquet.write_table(pyarrow.Table.from_pylist(table), files[-1])
    answers = [predicted(trained.path, tmp_path / f"{n}.jsonl", file) for n, file in enumerate(files)]
    assert [row["predicted"] for row in answers[0]] == [row["predicted"] for row in answers[1]]
    assert [row["label"] for row in answers[2]] == kinds and b"PNG" not in (tmp_path / "2.jsonl").read_bytes()
    data = {"train": (str(files[2]),), "val": (str(lines), str(files[1]))}
    run = RunFolder(start(settings(shapes, tmp_path, data=data, training={"steps": 1})))
    assert load_labels(run.model).names == tuple(sorted(KINDS))
    assert json.loads((run.path / "results.json").read_text("utf-8"))["texts"] == 16
    again = sum((tmp_path / r["image"]).read_bytes() in [t["image"]["bytes"] for t in table] for r in rows)
    told = capsys.readouterr().out
    assert (
        again and f"warning: {2 * again} of 16 pictures that are held out are among those that are trained on" in told
    )
    several = [{"image": row["image"], "label": row["label"].split()} for row in rows]
    config = settings(
        shapes, tmp_path, data={"train": (str(write_lines(tmp_path / "b.jsonl", several)),)}, training={"steps": 2},
        run=str(tmp_path / "several"), classify=LabelConfig(class_weights="balanced"),
    )  # fmt: skip
    run = RunFolder(start(config))
    assert load_labels(run.model)[:2] == (("blue", "disc", "square", "红"), True)
    (answer,) = predicted(run.path, tmp_path / "one.csv.jsonl", tmp_path / "3 [a].png")
    assert set(answer["probabilities"]) == {"blue", "disc", "square", "红"}


def test_what_is_refused(shapes, tmp_path, trained, capsys, monkeypatch):
    def refused(match, **changes):
        data = changes.pop("data", {})
        config = settings(shapes, tmp_path, training={"steps": 1}, data=data, **changes)
        with pytest.raises(UserError, match=match):
            start(config)

    photos = shutil.copytree(shapes / "my photos", tmp_path / "photos")
    drawn(KINDS[0], random.Random(0)).save(photos / "loose.png")
    refused(
        r"1 of 161 pictures do not lie in a folder named after their label, .*/LABEL/loose\.png",
        data={"train": (str(photos),)},
    )
    (photos / "loose.png").unlink()
    refused("only the label", data={"train": (str(photos / KINDS[0]),)})
    broken = photos / KINDS[1] / "broken.jpg"
    broken.write_bytes(b"no picture")
    refused(r"broken\.jpg:1: not a picture", data={"train": (str(photos),)})
    (photos / "HEIC alone").mkdir()
    start(settings(shapes, tmp_path, training={"steps": 1}, data={"train": (str(photos),), "on_error": "skip"}))
    told = capsys.readouterr()
    assert "Skipped 1 of 161 records" in told.err
    assert "photos: no picture that is read lies in HEIC alone, so they are no labels" in told.out
    with pytest.raises(UserError, match=r"broken\.jpg:1: not a picture"):
        predicted(trained.path, tmp_path / "none.jsonl", photos)
    found = predicted(trained.path, tmp_path / "some.jsonl", photos, on_error="skip")
    assert len(found) == 160 and "Skipped 1 of 161 records, the first: " in capsys.readouterr().err
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = [{"image": content(drawn(KINDS[0], random.Random(0)))}, {"image": None}, {"image": b"no picture"}]
    for count, name in ((3, "some.parquet"), (1, "none.parquet")):
        parquet.write_table(pyarrow.Table.from_pylist(table[-count:]), tmp_path / name)
    with pytest.raises(UserError, match=r"some\.parquet:2: expected a field `image` .* found image is null"):
        predicted(trained.path, tmp_path / "none.jsonl", tmp_path / "some.parquet")
    assert len(predicted(trained.path, tmp_path / "one.jsonl", tmp_path / "some.parquet", on_error="skip")) == 1
    assert "Skipped 2 of 3 records" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none\.parquet:1: not a picture"):
        predicted(trained.path, tmp_path / "none.jsonl", tmp_path / "none.parquet", on_error="skip")
    rows = {
        "a picture .image. and a text": {"image": str(broken), "text": "a", "label": "b"},
        "has 2 pictures": {"image": ["a", "b"], "label": "c"},
        "expected a field `image`": {"label": "c"},
        "names another: Image": {"Image": str(broken), "label": "c"},
    }
    for match, row in rows.items():
        refused(match, data={"train": (str(write_lines(tmp_path / "rows.jsonl", [row])),)})
    for on_error in ("stop", "skip"):  # where none is left, too
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / KINDS[2] / 'nothing.png'}\n"))
        with pytest.raises(UserError, match=r"standard input:1: the picture .*nothing\.png cannot be read"):
            run_predict(PredictConfig(model=str(trained.path), on_error=on_error))
    with pytest.raises(UserError, match="is a classifier of pictures; ask minimind classify predict or serve"):
        Scorer(str(trained.path))
    with pytest.raises(UserError, match="SigLIP models are for"):
        load_engine(str(trained.path))
    with pytest.raises(ValueError, match="init_from other and"):
        dataclasses.replace(settings(shapes, tmp_path), init_from="other")
    with pytest.raises(UserError, match=r"holds pictures, which classify reads with --vision\.tower"):
        expand_paths([photos / KINDS[0]])


def test_a_few_pictures_and_the_head_of_another_classifier(shapes, trained, tmp_path, capsys):
    few = tmp_path / "few"
    for kind in KINDS:
        shutil.copytree(shapes / "my photos" / kind, few / kind, ignore=lambda place, names: sorted(names)[1:])
    data, loop = {"train": (str(few),), "val_fraction": None}, {"batch_tokens": None, "steps": 1}
    config = settings(shapes, tmp_path, data=data, training=loop, optimizer=OptimizerConfig(learning_rate=0.0))
    run = RunFolder(start(dataclasses.replace(config, vision=ClassifyVisionConfig(str(trained.path)))))
    assert "is left out" not in capsys.readouterr().out
    before, after = (load_picture_classifier(folder)[1] for folder in (trained.model, run.model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
