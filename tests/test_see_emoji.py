"""The records of scripts/see_emoji.py, of discs drawn in the place of emoji."""

import io
import json
from collections import Counter

import numpy as np
import pytest

from tests.conftest import ROOT

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
pa = pytest.importorskip("pyarrow", reason="emoji are in a Parquet file")

NAMES = {
    "red cat": (220, 30, 30),
    "blue taxi": (40, 60, 230),
    "yawning face": (255, 204, 77),
    "green hat": (30, 200, 40),
}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import see_emoji

        yield see_emoji


@pytest.fixture
def emoji(script, tmp_path):
    from PIL import ImageDraw
    from pyarrow import parquet

    rows = []
    for name, colour in NAMES.items():
        image = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(image).ellipse((6, 6, 90, 90), fill=colour)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        for said in ("这是一个图标。", f"This is an icon of {name}."):
            talk = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": said}]
            rows.append({"image_bytes": stream.getvalue(), "conversations": json.dumps(talk)})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "emoji.parquet")
    return script.read_emoji(tmp_path / "emoji.parquet")


def test_emoji_are_what_their_names_and_pictures_say(script, emoji):
    assert [one.name for one in emoji] == list(NAMES)
    assert [one.kind for one in emoji] == ["animal", "vehicle", "face", ""]
    assert [one.colour for one in emoji] == ["red", "blue", "yellow", "green"]


def test_questions_are_about_what_their_pictures_show(script, emoji, tmp_path):
    asked = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        script.write_questions(emoji, folder)
        asked.append((folder / "questions.jsonl").read_text("utf-8"))
    assert asked[0] == asked[1]
    records = [json.loads(line) for line in asked[0].splitlines()]
    counts = [record for record in records if record["task"] == "count"]
    assert Counter(record["task"] for record in records) == {"count": 16, "colour": 4, "kind": 6}
    for record in counts:
        pixels = np.asarray(Image.open(tmp_path / "one" / record["image"]).convert("L")).astype(int)
        assert blobs(pixels < 215) == int(record["answer"])
    captions = [json.loads(line) for line in (tmp_path / "one" / "captions.jsonl").read_text("utf-8").splitlines()]
    assert Counter(record["task"] for record in captions) == {"count": 16, "colour": 4, "kind": 3}
    for record in records + captions:
        assert record["answer"] in record["choices"] and (tmp_path / "one" / record["image"]).is_file()


def blobs(is_ink):
    """Connected regions of more than a few pixels."""
    from scipy.ndimage import label

    found, count = label(is_ink)
    return sum((found == n).sum() > 40 for n in range(1, count + 1))
