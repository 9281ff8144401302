"""/classify by a classifier of pictures, beside what the library itself says of the same pictures."""

import base64

import httpx
import jax
import numpy as np
import pytest

from minimind_jax.convert.hf import Labels, save_hf
from minimind_jax.inference.score import PictureScorer
from minimind_jax.model.config import TowerConfig
from minimind_jax.model.heads import init_head
from minimind_jax.model.image_model import ImageModel
from minimind_jax.model.vision import init_vision
from minimind_jax.serve import pictures
from tests.serve.conftest import running
from tests.serve.seeing import data_url, drawing, encoded

TOWER = TowerConfig(32, 48, 2, 2, 16, 4, resample=2)
FILES = [encoded(drawing(n)) for n in range(11)]
URLS = [data_url(file) for file in FILES]


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    tower = init_vision(ImageModel(TOWER).vision, 1, 0.5, jax.random.key(0))["tower"]
    params = {"vision": {"tower": tower}, **init_head(jax.random.key(1), 32, 3, bias=True)}
    params["score"]["kernel"] = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    folder = tmp_path_factory.mktemp("flowers") / "flowers"
    return save_hf(folder, TOWER, params, None, "float32", labels=Labels(("rose", "tulip", "野花")))


@pytest.fixture(scope="module")
def eyes(flowers, folder):
    """It is served before a model of texts."""
    with running(model=(str(flowers), f"tiny={folder}"), slots=1, context=256, max_images=16) as server:
        with httpx.Client(base_url=server.root, timeout=60) as client:
            yield client


def test_pictures_have_the_labels_that_the_classifier_gives_them(eyes, flowers):
    asked = [part(url) if n % 2 else url for n, url in enumerate(URLS)]  # more than are looked at together
    found = eyes.post("/classify", json={"input": asked}).json()
    assert (found["model"], [item["index"] for item in found["data"]]) == ("flowers", [*range(len(URLS))])
    logits = PictureScorer(str(flowers)).pictures((file, "picture") for file in FILES).astype(np.float64)
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose([item["probs"] for item in found["data"]], likely, atol=1e-6)
    labels = [("rose", "tulip", "野花")[i] for i in likely.argmax(1)]
    assert [item["label"] for item in found["data"]] == labels and len(set(labels)) > 1
    for one in (URLS[3], part(URLS[3]), [{"type": "input_image", "image_url": URLS[3]}]):
        (alone,) = eyes.post("/classify", json={"input": one, "model": "flowers"}).json()["data"]
        assert alone["probs"] == pytest.approx(found["data"][3]["probs"], abs=1e-6)


def test_a_server_that_is_ready_compiles_nothing_more_for_pictures(flowers):
    with running(model=(str(flowers),)) as server:
        scorer = next(iter(server.models)).scorer
        compiled = scorer._scores._cache_size()
        for count in (1, 3, 11):
            asked = {"input": URLS[:count]}
            assert httpx.post(f"{server.root}/classify", json=asked, timeout=60).status_code == 200
        assert scorer._scores._cache_size() == compiled == 4


@pytest.mark.parametrize(
    "value, words",
    [
        ("a red flower", "input[0]: pictures come as data URLs"),
        ([URLS[0], base64.b64encode(FILES[0]).decode()], "input[1]: pictures come as data URLs"),
        ("file:///etc/passwd", "input[0]: pictures come as data URLs"),
        ("http://127.0.0.1/a.png", "input[0]: this server fetches no pictures from addresses"),
        ([URLS[0], data_url(b"%PDF")], "input[1]: not a picture that is read"),
        ([URLS[0], {"type": "text", "text": "a flower"}], "every item of input has to be a picture"),
        ([URLS[0], {}], "every item of input has to be a picture"),
        ([{"image_url": URLS[0], "text": "a flower"}], "input[0] has image_url and text"),
        (URLS * 2, "the request shows 22 pictures; this server looks at 16"),
        ([], "input"),
        ([5], "input"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(eyes, value, words):
    found = eyes.post("/classify", json={"input": value, "model": "flowers"})
    assert found.status_code == 400 and words in found.json()["error"]["message"]


def test_fields_of_other_servers_are_not_passed_over(eyes):
    error = eyes.post("/classify", json={"input": URLS[0], "images": [URLS[1]]}).json()["error"]
    assert "images is not looked at: pictures stand in input" in error["message"]


def test_a_picture_at_an_address_is_fetched_where_that_is_allowed(flowers, monkeypatch):
    async def download(places, most):
        return {url: FILES[int(url[-1])] for url in places}

    monkeypatch.setattr(pictures, "download", download)
    with running(model=(str(flowers),), image_urls=True) as server:
        asked = ["https://example.org/2", URLS[2], part("https://example.org/2")]
        found = httpx.post(f"{server.root}/classify", json={"input": asked}, timeout=60).json()["data"]
    assert all(item["probs"] == pytest.approx(found[1]["probs"]) for item in found)


def test_it_tells_what_it_reads_and_leaves_words_to_others(eyes):
    listed = {item["id"]: item for item in eyes.get("/v1/models").json()["data"]}
    assert listed["flowers"]["architecture"] == {"input_modalities": ["image"], "output_modalities": []}
    assert (listed["flowers"]["task"], listed["flowers"]["max_model_len"]) == ("classify", None)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [50]})):
        assert eyes.post(path, json=body).status_code == 200  # by the first that reads words
        refused = eyes.post(path, json={**body, "model": "flowers"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    for path in ("/v1/chat/completions", "/v1/embeddings", "/score"):
        body = {"messages": [{"role": "user", "content": "a"}], "input": "a", "model": "flowers"}
        assert eyes.post(path, json=body).status_code == 400
