"""Records with pictures: the ways to say where they are, what is refused, how they are stored, packed and read."""

import base64
import io
import json
import re

import numpy as np
import pytest
from worlds import write_lines

from minimind_jax.config.sections import DataConfig, ImagesConfig, ReadingConfig
from minimind_jax.config.tools import ConvertDataConfig, InspectConfig
from minimind_jax.data import convert_command, inspect
from minimind_jax.data.batches import Batches
from minimind_jax.data.epoch import describe_cuts
from minimind_jax.data.feature_store import picture_digests
from minimind_jax.data.images import read_image
from minimind_jax.data.jsonl import READING, iter_records
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.packing import Order, plan_whole
from minimind_jax.data.pictures import Marker, find_file
from minimind_jax.data.pixels import Pixels
from minimind_jax.data.prompts import read_prompt
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import TowerConfig

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

TOWER = TowerConfig(16, 24, 2, 2, 8, 4, resample=0)
IMAGE = Marker("<|image_pad|>", 4)
MARKER = 12
ANSWER = {"role": "assistant", "content": "the cat"}


# a picture that the assistant would show
SHOWN_BACK = [
    {"role": "user", "content": "draw"},
    {"role": "assistant", "content": [{"type": "image", "image": "photos/1.png"}]},
    {"role": "user", "content": "again"},
]


def content(shade, side=10, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(stream, kind)
    return stream.getvalue()


def asked(text, **fields):
    return {"conversations": [{"role": "user", "content": text}, ANSWER], **fields}


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.load(world.folder / "tokenizer")


@pytest.fixture
def data(tmp_path):
    """Settings of the file with these records, beside which lie pictures of the shades 1 to 9."""
    (tmp_path / "photos").mkdir()
    for shade in range(1, 10):
        (tmp_path / "photos" / f"{shade}.png").write_bytes(content(shade))

    def write(*records, **settings):
        file = write_lines(tmp_path / "talk.jsonl", records) if records else str(tmp_path / "talk.parquet")
        settings = {"seq_len": 64, "system_prompt_probability": 0.0, "empty_think_removal": 0.0, **settings}
        return ImagesConfig(train=(file,), cache_dir=str(tmp_path / "cache"), tokenizer_workers=1, **settings)

    return write


def built(data, tokenizer):
    return build_cache("images", data.train, tokenizer, data, seed=0, marker=IMAGE)


def shades(pixels):
    """Of each row the shades of its pictures, 0 for none."""
    assert (pixels == pixels[..., :1, :1, :1]).all()
    return pixels[..., 0, 0, 0].tolist()


def image_url(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


SAID = [
    (asked("<image>\nwhat is it?", image="photos/1.png"), [1]),
    (asked("this <image> or <image>?", images=["photos/2.png", "photos/3.png"]), [2, 3]),
    (asked("<image><image>", images=[{"bytes": None, "path": "photos/4.png"}, {"path": "photos/5.png"}]), [4, 5]),
    (asked([{"type": "text", "text": "what?"}, image_url("photos/6.png")]), [6]),
    (asked([image_url("data:image/png;base64," + base64.b64encode(content(7)).decode())]), [7]),
    (asked([{"type": "image", "image": "photos/8.png"}, {"type": "text", "text": "?"}]), [8]),
    (asked([{"type": "image"}, {"type": "text", "text": "?"}], images=["photos/9.png"]), [9]),
    (asked("what?", image="photos/1.png"), [1]),  # in front of the question
    (asked("words alone"), []),
    ({"instruction": "what is in <image>?", "output": "cat", "image": "photos/2.png"}, [2]),
    ({"texts": [{"user": "what?", "assistant": "cat", "source": "x"}], "images": ["photos/3.png"]}, [3]),
]


def test_pictures_are_read_however_a_record_names_them(data, tokenizer, capfd):
    settings = data(*(record for record, _ in SAID), shuffle=False, images_per_row=2)
    cache = built(settings, tokenizer)
    assert "no `<image>` in the text: the pictures stand in front of the first question" in capfd.readouterr().err
    assert cache.pictures.counts(64).tolist() == [len(found) for _, found in SAID]
    for document, (_, found) in enumerate(SAID):
        ids = cache.ids(document, 0, 99)
        assert (ids == MARKER).sum() == 4 * len(found)
        starts = [start for start, _ in cache.pictures.of(document)]
        assert np.flatnonzero(ids == MARKER)[::4].tolist() == starts
        assert not cache.is_trained(document, 0, 99)[ids == MARKER].any()
        pixels = [read_image(picture, TOWER, "") for _, picture in cache.pictures.of(document)]
        assert [int(p[0, 0, 0]) for p in pixels] == found


def test_rows_hold_their_pictures_in_the_order_of_their_markers(data, tokenizer):
    settings = data(*(record for record, _ in SAID), shuffle=False, images_per_row=3)
    cache = built(settings, tokenizer)
    pixels = Pixels(TOWER, 3)
    batches = Batches(cache, settings, 2, 0, tokenizer.token_bytes(), annotate=pixels.annotate)
    rows = list(batches.iterate(0, batches.steps_per_epoch))
    found = [shade for batch in rows for row in shades(batch["pixels"]) for shade in row if shade]
    assert found == [shade for _, shades in SAID for shade in shades]
    for batch in rows:
        for tokens, row in zip(batch["tokens"], shades(batch["pixels"]), strict=True):
            count = (tokens == MARKER).sum() // 4
            assert all(row[:count]) and not any(row[count:])


def test_minimind_v_tables(data, tokenizer, tmp_path, capfd):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    talks = [asked("<image>\nwhat?"), asked("what?<image>"), asked("words alone"), asked("<image>?")]
    images = [content(1, kind="JPEG"), content(2), content(0, side=8, kind="JPEG"), b"no picture"]
    columns = {"conversations": [json.dumps(talk["conversations"]) for talk in talks], "image_bytes": images}
    pyarrow.parquet.write_table(arrow.table(columns), tmp_path / "talk.parquet")
    with pytest.raises(UserError, match=r"talk\.parquet:4: image 1: not a picture that is read"):
        built(data(), tokenizer)
    cache = built(data(on_error="skip"), tokenizer)
    assert cache.pictures.counts(64).tolist() == [1, 1, 0] and cache.info["skipped"] == 1
    assert "a picture of 8 x 8 pixels and no `<image>` in the text: words alone" in capfd.readouterr().err
    assert read_image(cache.pictures.of(1)[0][1], TOWER, "").max() == 2
    lists = {**columns, "image_bytes": [[content(3), content(4)]] * 4}
    lists["conversations"] = [json.dumps(asked("<image> or <image>?")["conversations"])] * 4
    pyarrow.parquet.write_table(arrow.table(lists), tmp_path / "talk.parquet")
    assert built(data(), tokenizer).pictures.counts(64).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (asked("<image> <image>", image="photos/1.png"), r"1 pictures, and 2 times <image>"),
        (asked("<image>", image="photos/none.png"), r"image 1: the picture .*none\.png cannot be read: No such file"),
        (
            asked("<image>", image=r"photos\1.png"),
            r"cannot be read: No such file .*; folders of a path are parted by /",
        ),
        (asked("<image>", image="talk.jsonl"), "not a picture that is read"),
        (asked("<image>", image="https://a.b/c.png"), "is an address .*; download the picture"),
        (asked("<image>", image=3), "image.0. is a number; expected the path of a picture"),
        (asked("<image>", image="photos/1.png", images=["photos/1.png"]), "pictures in two fields"),
        (asked([image_url("data:image/png;base64,???")]), "a data URL that is not base64"),
        (asked([{"type": "image"}, image_url("photos/1.png")]), "some pictures are parts of messages and some"),
        (asked("<image>", image="HTTPS://a.b/c.png"), "is an address .*; download the picture"),
        (asked("<image>", image="s3://a/c.png"), "is an address .*; download the picture"),
        (
            asked("<image>", image="data:image/png,abc"),
            "a data URL that is not base64 .*; write data:image/png;base64,",
        ),
        ({"messages": [*SHOWN_BACK, ANSWER]}, "a picture in a message of assistant; it is the user who shows"),
        (
            asked([{**image_url("photos/1.png"), "text": "?"}]),
            "part 1 of a message has image_url and text; make a part",
        ),
        (asked([{"image": "photos/1.png", "image_url": "photos/2.png"}]), "has image and image_url"),
        (
            asked([image_url("photos/1.png"), {"type": "text", "text": "?", "image": "b.png"}]),
            "part 2 .* image and text",
        ),
        (asked("<|image_pad|> hm"), r"the text has <\|image_pad\|>, which stands for pictures"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(data, tokenizer, record, said):
    with pytest.raises(UserError, match=said) as error:
        built(data(asked("words"), record), tokenizer)
    assert "talk.jsonl:2" in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        *("~/photos/a%20b.png", "file://{}/photos/a%2520b.png", "FILE://{}/photos/a%2520b.png", "photos/a%20b.png"),
        *("file://localhost{}/photos/a%2520b.png", "file:{}/photos/a%2520b.png"),
    ],
)
def test_addresses_of_files_are_as_people_write_them(data, tmp_path, monkeypatch, address):
    data()
    (tmp_path / "photos" / "a%20b.png").write_bytes(content(7))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_file(address.format(tmp_path), tmp_path, "here")
    assert read_image(found, TOWER, "").max() == 7


def test_a_path_from_the_current_folder_is_told_where_paths_begin(data, tmp_path, monkeypatch):
    data()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"here: photos/1\.png is there in the current folder, and not in \S+elsewhere"):
        find_file("photos/1.png", tmp_path / "elsewhere", "here")
    assert find_file("photos/none.png", tmp_path / "elsewhere", "here") == tmp_path / "elsewhere/photos/none.png"


def test_a_small_picture_is_one_unless_it_is_black(data, tokenizer):
    url = base64.b64encode(content(9, side=8)).decode()
    assert built(data(asked("what?", image=f"DATA:image/png;base64,{url}")), tokenizer).pictures.counts(64) == [1]
    url = base64.b64encode(content(0, side=8)).decode()
    assert built(data(asked("what?", image=f"data:image/png;base64,{url}")), tokenizer).pictures.counts(64) == [0]


def test_a_part_may_leave_its_type_out(data, tokenizer):
    parts = [{"image_url": {"url": "photos/3.png"}, "text": None}, {"image": "photos/4.png"}, {"text": "what?"}]
    cache = built(data(asked(parts)), tokenizer)
    assert [read_image(picture, TOWER, "").max() for _, picture in cache.pictures.of(0)] == [3, 4]


def test_a_system_turn_and_answers_keep_the_word(data, tokenizer):
    talk = [{"role": "system", "content": "<image>"}, {"role": "user", "content": "<image>"}]
    cache = built(data({"messages": [*talk, {**ANSWER, "content": "<image>"}], "image": "photos/1.png"}), tokenizer)
    assert (cache.ids(0, 0, 99) == MARKER).sum() == 4
    assert any("`<image>` in what others than the user say is read as a word" in line for line in cache.info["told"])
    assert built(data(asked("an <image> tag")), tokenizer).pictures.counts(64).tolist() == [0]


def test_a_picture_that_is_gone_when_its_row_is_read_is_told(data, tokenizer, tmp_path):
    settings = data(asked("<image>", image="photos/1.png"))
    cache = built(settings, tokenizer)
    (tmp_path / "photos" / "1.png").unlink()
    batches = Batches(cache, settings, 1, 0, tokenizer.token_bytes(), annotate=Pixels(TOWER, 1).annotate)
    with pytest.raises(UserError, match=r"record 1, image 1: the picture .* cannot be read"):
        list(batches.iterate(0, 1))


def test_files_that_are_gone_are_told_before_a_run_comes_to_them(data, tokenizer, tmp_path):
    url = "data:image/png;base64," + base64.b64encode(content(4)).decode()
    inside = asked([{"type": "image", "image": url}])
    files = asked("<image><image>", images=["photos/1.png", "photos/2.png"])
    cache = built(data(asked("words"), inside, files, shuffle=False), tokenizer)
    assert len(set(picture_digests(cache, tmp_path))) == 3
    (tmp_path / "photos" / "2.png").unlink()
    with pytest.raises(UserError, match=r"record 3, image 2: the picture .*2\.png is gone .*minimind data cache"):
        picture_digests(cache, tmp_path)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_rows_hold_no_more_tokens_or_images_than_they_may(shuffle, most):
    rng = np.random.default_rng(most)
    lengths, images = rng.integers(1, 90, 300), rng.integers(0, 4, 300)
    plan = plan_whole(lengths, 64, Order(0, 0, shuffle), images=images, images_per_row=most)
    row_of = np.repeat(np.arange(plan.rows), np.diff(plan.row_starts))
    assert np.bincount(row_of, plan.stops - plan.starts).max() <= 64
    assert np.bincount(row_of, images[plan.documents]).max() <= most
    assert sorted(plan.documents) == np.flatnonzero(images <= most).tolist()
    assert not plan.starts.any() and plan.left_out == (images > most).sum()
    fewest = max(plan.tokens / 64, images[images <= most].sum() / most)
    assert plan.rows <= 1.5 * fewest or not shuffle


def test_what_has_too_many_images_is_left_out_and_told(data, tokenizer):
    settings = data(*(record for record, _ in SAID), images_per_row=1)
    cache = built(settings, tokenizer)
    batches = Batches(cache, settings, 1, 0, tokenizer.token_bytes())
    told = "2 conversations with images left out that have more images than data.images_per_row (up to 2)"
    assert told in describe_cuts(batches.epoch(0))


def test_a_conversation_cut_within_an_image_shows_those_that_begin(data, tokenizer):
    many = asked("<image>" * 6, images=[f"photos/{n}.png" for n in range(1, 7)])
    many["conversations"].insert(0, {"role": "user", "content": "a"})
    many["conversations"].insert(1, ANSWER)
    settings = data(many, asked("<image>", image="photos/9.png"), seq_len=50)
    cache = built(settings, tokenizer)
    begun = int((cache.ids(0, 0, 50) == MARKER).sum())
    assert 0 < begun < 24 and begun % 4
    annotate = Pixels(TOWER, settings.image_room(IMAGE.tokens)).annotate
    batches = Batches(cache, settings, 2, 0, tokenizer.token_bytes(), annotate=annotate)
    (batch,) = batches.iterate(0, 1)
    rows = sorted([shade for shade in row if shade] for row in shades(batch["pixels"]))
    assert rows == [list(range(1, begun // 4 + 2)), [9]]
    assert "1 of 2 conversations with images are longer than data.seq_len 50" in describe_cuts(batches.epoch(0))


def test_inspect_shows_where_images_stand(data, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    (file,) = data(asked("<image><image>or?", images=["photos/2.png", "photos/3.png"]), asked("what?")).train
    folder = str(world.folder / "tokenizer")
    inspect.run(InspectConfig(files=(file,), tokenizer=folder, image_tokens=4, seq_len=64))
    shown = capsys.readouterr().out
    assert f"[image 1: 10 x 10, {tmp_path}/photos/2.png][image 2: 10 x 10, {tmp_path}/photos/3.png]or?" in shown
    page = tmp_path / "page.html"
    wide = data(asked("<b>left<image><image>", images=["photos/2.png", "photos/3.png"])).train
    inspect.run(InspectConfig(files=wide, tokenizer=folder, image_tokens=4, seq_len=64, html=str(page)))
    assert str(page) in capsys.readouterr().out
    written = page.read_text("utf-8")
    assert "&lt;b&gt;left<img" in written and "<b>left" not in written and "<|image_pad|>" not in written
    assert "<b>the cat" in written
    for name, source in zip(("2", "3"), re.findall(r'src="data:image/png;base64,([^"]+)"', written), strict=True):
        assert f"10 x 10, {tmp_path}/photos/{name}.png" in written
        drawn = Image.open(io.BytesIO(base64.b64decode(source)))
        original = Image.open(tmp_path / "photos" / f"{name}.png").convert("RGB")
        assert drawn.tobytes() == original.tobytes()
    with pytest.raises(UserError, match="there is no folder"):
        inspect.run(InspectConfig(files=wide, tokenizer=folder, html=str(tmp_path / "none" / "page.html")))
    assert "<|image_pad|>" not in shown and "packing 2 conversations with images into rows of 64 tokens" in shown


def test_converted_records_are_the_same_to_see(data, tokenizer, tmp_path):
    (file,) = data(*(record for record, _ in SAID)).train
    before = built(data(*(record for record, _ in SAID)), tokenizer)
    convert_command.run(ConvertDataConfig(files=(file,), output=str(tmp_path / "ours.jsonl"), kind="images"))
    after = build_cache("images", [tmp_path / "ours.jsonl"], tokenizer, data(asked("w")), seed=0, marker=IMAGE)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    for document in range(len(before)):
        for (_, a), (_, b) in zip(before.pictures.of(document), after.pictures.of(document), strict=True):
            np.testing.assert_array_equal(read_image(a, TOWER, ""), read_image(b, TOWER, ""))


def test_stages_of_words_say_who_takes_pictures(data, tokenizer):
    words = DataConfig(tokenizer_workers=1)
    for record in (asked("<image>", image="photos/1.png"), asked([image_url("photos/1.png")])):
        with pytest.raises(UserError, match="vlm-sft"):
            build_cache("conversation", data(record).train, tokenizer, words, seed=0)


def test_who_answers_or_scores_words_refuses_pictures(data):
    [parts] = iter_records(data(asked([image_url("photos/1.png")])).train)
    [field] = iter_records(data(asked("?", image="photos/1.png")).train)
    for read in (read_prompt, lambda record, reading: parse_conversation(record, False, reading)):
        for record in (parts, field):
            with pytest.raises(UserError, match=r"talk.jsonl:1: it shows pictures, and words alone are read here"):
                read(record, READING)
        read(field, ReadingConfig(ignore_fields=("image",)))
