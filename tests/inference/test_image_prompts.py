"""Messages that show pictures, as the chat template takes them."""

import base64

import pytest

from minimind_jax.data.images import open_picture
from minimind_jax.data.pictures import Marker, read_data_url
from minimind_jax.errors import UserError
from minimind_jax.inference.image_prompts import open_images
from minimind_jax.model.config import TowerConfig, Vision

VISION, IMAGE = Vision(TowerConfig(16, 24, 1, 2, 8, 4), 12), Marker("<|image_pad|>", 4)
MARKERS = {"type": "text", "text": "<|image_pad|>" * 4}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_parts_that_are_pictures_become_markers_in_their_places(photos):
    data = [(photos / f"{n}.png").read_bytes() for n in range(1, 6)]
    own = open_picture(data[4], VISION.tower, "")
    url = "data:image/png;base64," + base64.b64encode(data[0]).decode()
    messages = [
        {"role": "system", "content": "s"},
        user({"type": "image_url", "image_url": {"url": url}}, "or", {"type": "image", "image": data[1]}),
        {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]},
        user({"type": "text", "text": "<image>"}, {"type": "input_image", "image_url": "3"}),
        {"role": "tool", "content": [{"type": "image", "image": own}], "tool_call_id": "x"},
    ]
    asked = []

    def fetch(address, where):
        asked.append((address, where))
        return read_data_url(address, where) if address.startswith("data:") else photos / f"{address}.png"

    found, pictures = open_images(messages, VISION, IMAGE, fetch)
    assert found == [
        messages[0], user(MARKERS, "or", MARKERS), messages[2], user(messages[3]["content"][0], MARKERS),
        {"role": "tool", "content": [MARKERS], "tool_call_id": "x"},
    ]  # fmt: skip
    assert [picture.pixels[0, 0, 0] for picture in pictures] == [40, 80, 120, 200] and pictures[3] is own
    assert asked == [(url, "messages[1].content[0]"), ("3", "messages[3].content[1]")]
    assert open_images(found[:1], None, None, fetch) == (messages[:1], ())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"role": "assistant", "content": [{"type": "image", "image": "1"}]},
            r"content\[0\] is a picture in a message of assistant",
        ),
        (user({"type": "image_url", "image_url": {}}), r"messages\[0\].content\[0\] .* without an address or content"),
        (user({"type": "image_url", "image_url": {"url": 3}}), "without an address or content: a number"),
        (user({"type": "image", "image": b"GIF89a"}), r"messages\[0\].content\[0\]: not a picture"),
        (
            user({"type": "text", "text": "what?", "image_url": {"url": "1"}}),
            r"messages\[0\].content\[0\] has image_url and text; make a part of each of them",
        ),
        (user({"type": "image", "image": "1", "text": "what?"}), "has image and text"),
        (user({"image_url": {"url": "1"}, "input_image": {"url": "2"}}), "has image_url and input_image"),
        (user({"type": "text", "text": "a<|image_pad|>"}), "which stands for pictures"),
        ({"role": "user", "content": "<|image_pad|>"}, "which stands for pictures"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(message, said):
    with pytest.raises(UserError, match=said):
        open_images([message], VISION, IMAGE, None)


def test_a_model_of_texts_says_so():
    with pytest.raises(UserError, match=r"messages\[0\].content\[0\] is a picture, and this model reads words alone"):
        open_images([user({"type": "image_url", "image_url": {"url": "x"}})], None, None, None)
