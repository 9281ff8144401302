"""Answers about pictures: greedy ones are those of transformers, whatever else the engine does meanwhile."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.convert.hf import save_hf
from minimind_jax.data.images import Picture
from minimind_jax.errors import UserError
from minimind_jax.inference import decode, image_encoder, programs
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.programs import Limits
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel

torch = pytest.importorskip("torch", reason="the comparison needs torch")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")

MARKER, N = 12, 9  # image tokens a picture
TOWER = TowerConfig(16, 24, 2, 2, 18, 6)
CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    max_position_embeddings=256, eos_token_id=None, initializer_range=0.3, vision=Vision(TOWER, MARKER),
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (18, 18, 3)).astype(np.uint8)
    return Picture(pixels, hashlib.blake2b(pixels).digest())


A, B, C = map(picture, range(3))


def words(count, seed=0):
    return np.random.default_rng(seed).integers(20, 160, count).tolist()


def prompt(*parts):
    """Ids and pictures of words (lists of ids) and pictures, in their order."""
    ids = [id for part in parts for id in (part if isinstance(part, list) else [MARKER] * N)]
    return ids, tuple(part for part in parts if not isinstance(part, list))


PROMPTS = {
    "one": prompt(words(4), A, words(6, 1)),
    "two": prompt(A, words(20, 2), B, words(3, 3)),
    "adjacent": prompt(words(2), A, B, words(5)),
    "the same twice": prompt(words(2), C, C, words(5)),
    "at the end": prompt(words(7), B),
    "none": prompt(words(30, 4)),
    "long": prompt(words(50, 5), A, words(9), B, C, words(40, 6), A, words(20, 7)),
}


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(programs.LIMITS, "cpu", Limits(64, 32, (16, 64)))
        yield


@pytest.fixture(scope="module")
def params():
    """What is in the pictures decides what is said, as with models that have learned to look."""
    params = jax.jit(MODEL.init)(jax.random.key(3))
    return {**params, "vision": jax.tree.map(lambda leaf: 2 * leaf, params["vision"])}


@pytest.fixture(scope="module")
def theirs(params, tmp_path_factory):
    folder = save_hf(tmp_path_factory.mktemp("seeing") / "model", CONFIG, params, dtype="float32")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()

    def generate(ids, images, count=8):
        pixels = np.stack([image.pixels for image in images]) if images else None
        shown = {}
        if images:
            pixels = torch.tensor(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2).contiguous()
            shown = {"pixel_values": pixels}
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(input_ids=torch.tensor([ids]), **shown, **options)[0, len(ids) :].tolist()

    return generate


def fixed(params):
    """An engine whose programs all of them share."""
    return Engine(MODEL, params, slots=4, context=256)


def finish(engine, *answers):
    while any(answer.finish_reason is None for answer in answers):
        engine.step()
    return answers


def submit(engine, ids, images, **options):
    return engine.submit(Request(tuple(ids), GREEDY, images=tuple(images), **options))


@pytest.mark.slow
def test_what_is_warmed_up_is_compiled(params):
    engine = fixed(params)
    engine.warm_up()
    counts = [program._cache_size() for program in (decode.read, decode.look, decode.make, decode.choose)]
    answers = [submit(engine, *each) for each in PROMPTS.values()]
    many = submit(engine, *prompt(*map(picture, range(10, 20)), words(3)))
    finish(engine, *answers, many)
    assert counts == [program._cache_size() for program in (decode.read, decode.look, decode.make, decode.choose)]


def test_answers_are_those_of_transformers(params, theirs):
    """Together, alone, streamed, and with prompts in parts that cut pictures."""
    expected = [theirs(*each) for each in PROMPTS.values()]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    ids, images = zip(*PROMPTS.values(), strict=True)
    engine = fixed(params)
    assert [answer.ids for answer in engine.generate(ids, GREEDY, images)] == expected
    assert engine._programs.image_encoder.looked == 3
    streamed = engine.stream(ids[1], GREEDY, images=images[1])
    assert [token.id for piece in streamed for token in piece.tokens] == expected[1]
    engine = fixed(params)
    engine._programs.limits = Limits(48, 16, (16,))
    answers = []
    for each in zip(ids, images, strict=True):  # some are read while others run
        answers.append(submit(engine, *each))
        engine.step()
    assert [answer.ids for answer in finish(engine, *answers)] == expected
    assert engine._programs.image_encoder.looked == 3


def test_a_second_turn_reads_only_what_is_new(params, theirs):
    engine = fixed(params)
    ids, images = PROMPTS["two"]
    [first] = engine.generate([ids], GREEDY, [images])
    longer, more = [*ids, *first.ids, 30, *[MARKER] * N, 31], (*images, C)
    [second] = engine.generate([longer], GREEDY, [more])
    assert second.cached_tokens == len(ids) + 7 and second.ids == theirs(longer, more)
    assert engine._programs.image_encoder.looked == 3


@pytest.mark.parametrize("before", [words(30), words(3)])
def test_what_was_read_of_another_picture_is_not_taken_for_it(before, params, theirs):
    engine = fixed(params)
    tail = words(20, 1)
    for shown, cached in ((A, 0), (B, len(before) * (len(before) > 16)), (A, len(before) + N + 19)):
        ids, images = prompt(before, shown, tail)
        answer = submit(engine, ids, images)
        finish(engine, answer)
        assert answer.ids == theirs(ids, images) and answer.cached_tokens == cached, cached


def test_a_picture_at_the_end_of_what_is_known_is_read(params, theirs):
    engine = fixed(params)
    ids, images = prompt(words(30), A)
    for cached in (0, len(ids) - 1):
        [answer] = engine.generate([ids], GREEDY, [images])
        assert answer.ids == theirs(ids, images) and answer.cached_tokens == cached


def test_prompts_of_words_know_nothing_of_pictures(params):
    """A model that sees, asked of words, runs the programs of one that does not."""
    engine = fixed(params)
    blind = Engine(LanguageModel(dataclasses.replace(CONFIG, vision=None)), params, slots=4, context=256)
    looked, read = decode.look._cache_size(), []
    for each in (engine, blind):
        jitted = decode.read.lower(
            each.model, each.params, decode.empty(each.model, 2, 256), np.zeros((2, 16), np.int32),
            each._programs._settings_of([], 2), *np.zeros((3, 2), np.int32),
        )  # fmt: skip
        read.append(jitted.as_text().count("\n"))
    [answer], [same] = (each.generate([words(30)], GREEDY) for each in (engine, blind))
    assert answer.ids == same.ids and read[0] == read[1] and decode.look._cache_size() == looked


def test_after_a_failure_and_with_other_parameters(params, theirs, monkeypatch):
    engine = fixed(params)
    ids, images = PROMPTS["adjacent"]

    def fail(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine._programs.image_encoder, "_look", fail)
        answer = submit(engine, ids, images)
        with pytest.raises(RuntimeError):
            engine.step()
    assert answer.finish_reason == "cancelled" and not engine.busy
    assert engine.generate([ids], GREEDY, [images])[0].ids == theirs(ids, images)
    other = {**params, "vision": jax.tree.map(lambda leaf: -leaf, params["vision"])}
    engine.load(other)
    [answer] = engine.generate([ids], GREEDY, [images])
    assert answer.ids == fixed(other).generate([ids], GREEDY, [images])[0].ids != theirs(ids, images)


def test_few_pictures_are_kept(params, monkeypatch):
    monkeypatch.setattr(image_encoder, "MOST_BYTES", 2 * N * 32 * 4)
    engine = fixed(params)
    ids, images = PROMPTS["long"]
    [answer] = engine.generate([ids], GREEDY, [images])
    assert (
        len(engine._programs.image_encoder._seen) == 2 and engine._programs.image_encoder.looked == 4
    )  # at one of them twice
    assert answer.ids == fixed(params).generate([ids], GREEDY, [images])[0].ids


def test_what_does_not_fit_is_refused(params):
    engine = Engine(MODEL, params)
    small = Picture(np.zeros((6, 6, 3), np.uint8), b"")
    ids, images = PROMPTS["one"]
    for prompt_ids, shown, message in (
        (ids, (), "9 markers of pictures .* and shows 0 pictures"),
        (ids, (A, B), "9 markers .* 2 pictures"),
        ([5, MARKER], (), "1 markers"),
        (ids, (small,), r"the shape \(6, 6, 3\); this model sees \(18, 18, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            engine.generate([prompt_ids], GREEDY, [shown])
    blind = Engine(LanguageModel(dataclasses.replace(CONFIG, vision=None)), params)
    with pytest.raises(UserError, match="reads words alone"):
        blind.generate([ids], GREEDY, [images])
    assert len(blind.generate([ids], GREEDY)[0].ids) == 8  # there the marker is a word
    assert not engine.busy
