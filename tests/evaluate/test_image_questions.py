"""Questions about pictures: marks and figures against plain passes, one record at a time; broken records; shuffling."""

import dataclasses
import itertools
import json
import random
import re
import types

import jax
import numpy as np
import pytest
from worlds import write_lines

from minimind_jax.cli import main
from minimind_jax.config.tools import EvaluateImagesConfig
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.images import read_image
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.evaluate.images import describe, evaluate_images, plain, shuffled
from minimind_jax.evaluate.share import Share
from minimind_jax.inference.engine import Engine
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
from PIL import ImageDraw  # noqa: E402

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}
TOWER = TowerConfig(16, 24, 1, 2, 16, 8, resample=2)  # 4 tokens an image
MARKER = 12
CONFIG = ModelConfig(
    vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.3, vision=Vision(TOWER, MARKER),
)  # fmt: skip


def discs(colour, count, side=24):
    """So many discs of that colour on grey."""
    image = Image.new("RGB", (side, side), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for n in range(count):
        x, y = n % 2 * side // 2, n // 2 * side // 2
        draw.ellipse((x, y, x + side // 2 - 2, y + side // 2 - 2), fill=COLOURS[colour])
    return image


@pytest.fixture(scope="module")
def seen(world, tmp_path_factory):
    """A folder with a model of random weights that looks, and questions about discs beside their pictures."""
    folder, rng = tmp_path_factory.mktemp("discs"), random.Random(0)
    model = LanguageModel(CONFIG)
    params = jax.jit(model.init)(jax.random.key(1))
    params = {**params, "vision": jax.tree.map(lambda leaf: 3 * leaf, params["vision"])}
    save_hf(folder / "model", CONFIG, params, Tokenizer.load(world.folder / "tokenizer"), "float32")
    choices, talks = [], []
    for n in range(9):
        colour, count = rng.choice(list(COLOURS)), rng.randrange(1, 5)
        discs(colour, count).save(folder / f"{n}.png")
        own = {"image": f"{n}.png"}
        asked = {"task": "colour", "question": "which colour?", "choices": list(COLOURS), "answer": colour}
        choices += [
            {**own, **asked},
            {**own, "question": "<image>how many?", "choices": [1, 2, 3, 4], "answer": str(count)},
        ]
        said = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": f"{count} {colour}"}]
        talks.append({**own, "task": "answers", "conversations": said})
    write_lines(folder / "choices.jsonl", choices)
    write_lines(folder / "talks.jsonl", talks)
    return folder


def evaluate(folder, *files, **settings):
    names = tuple(str(folder / file) for file in files)
    return evaluate_images(EvaluateImagesConfig(model=str(folder / "model"), files=names, max_new_tokens=6, **settings))


@pytest.fixture(scope="module")
def ask(seen):
    """Log-probabilities of answers, and the greedy text, by whole passes over one row."""
    config, params = load_hf(seen / "model")
    tokenizer, model = Tokenizer.load(seen / "model"), LanguageModel(config)
    marker = tokenizer.decode([MARKER], skip_special_tokens=False) * 4
    forward = jax.jit(lambda batch: model.logits(params, model.read_batch(params, batch).hidden_BTD))

    def logits(ids, pixels):
        row = np.zeros((1, 160), np.int32)
        row[0, : len(ids)] = ids
        batch = {"tokens": row, "lengths": np.array([len(ids)]), "pixels": pixels[None, None]}
        found = np.asarray(forward(batch)[0, : len(ids)], np.float64)
        return found - np.log(np.exp(found).sum(-1, keepdims=True))

    def ask(question, answers, file):
        pixels = read_image(seen / file, TOWER, file)
        prompt = encode_prompt(
            tokenizer, [{"role": "user", "content": question.replace("<image>", marker)}], None, False
        )
        log_probs = []
        for answer in answers:
            own = [*tokenizer.encode(str(answer)), tokenizer.turn_end_id]
            found = logits(prompt + own, pixels)[len(prompt) - 1 :]
            log_probs.append(found[np.arange(len(own)), own].sum())
        written = []
        while len(written) < 6 and not {*written} & {*tokenizer.end_ids}:
            written.append(int(logits(prompt + written, pixels)[-1].argmax()))
        return np.array(log_probs), tokenizer.decode(written)

    return ask


@pytest.mark.slow
def test_choices_are_those_of_whole_passes(seen, ask):
    colours, counts = evaluate(seen, "choices.jsonl")
    assert (colours.task, counts.task) == ("colour", "choices")
    assert (colours.chance, counts.chance) == (pytest.approx(1 / 3), 1 / 4)
    records = [json.loads(line) for line in (seen / "choices.jsonl").read_text().splitlines()]
    for result, own in ((colours, records[::2]), (counts, records[1::2])):
        right, exact = [], []
        for n, record in enumerate(own):
            question = record["question"] if "<image>" in record["question"] else f"<image>\n{record['question']}"
            expected, text = ask(question, record["choices"], record["image"])
            np.testing.assert_allclose(result.own.log_probs[n], expected, atol=2e-4)
            assert result.own.texts[n] == text
            due = str(record["answer"])
            right.append(str(record["choices"][expected.argmax()]) == due)
            exact.append(plain(text) == due)
        assert result.likeliest(result.own) == right and result.exact(result.own) == exact
        others = [tuple(question.pictures) for question in result.questions]
        assert others != shuffled(others, 42)
        assert any(not np.allclose(a, b) for a, b in zip(result.own.log_probs, result.shuffled.log_probs, strict=True))


def test_conversations_are_asked_for_their_last_answer(seen, ask, tmp_path):
    (result,) = evaluate(seen, "talks.jsonl", output=str(tmp_path / "out.jsonl"))
    records = [json.loads(line) for line in (seen / "talks.jsonl").read_text().splitlines()]
    due = [record["conversations"][1]["content"] for record in records]
    found = [ask("<image>\nwhat?", [text], record["image"]) for text, record in zip(due, records, strict=True)]
    bits = -sum(log_probs[0] for log_probs, _ in found) / np.log(2) / sum(map(len, due))
    assert result.bits_per_byte(result.own) == pytest.approx(bits, rel=1e-4)
    assert result.bits_per_byte(result.shuffled) != pytest.approx(bits, rel=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["right"], row["question"], row["answer"]) for row in rows] == [
        (text, "what?", said) for text, (_, said) in zip(due, found, strict=True)
    ]
    assert result.shuffled.texts == [row["answer_shuffled"] for row in rows]


def test_pictures_in_other_places(seen):
    missed = 0
    for seed, letters in itertools.product(range(20), ("abcde", "abcdefgh")):
        draw = random.Random(seed)
        pictures = [tuple(draw.choices(letters, k=draw.randrange(1, 4))) for _ in range(12)]
        others = shuffled(pictures, seed)
        assert others == shuffled(pictures, seed)
        if others is None:  # of five letters there are no such places for two of the seeds
            missed += 1
            assert letters == "abcde"
            continue
        assert [*map(len, others)] == [*map(len, pictures)]
        old, new = ([picture for own in each for picture in own] for each in (pictures, others))
        assert sorted(old) == sorted(new)
        assert not any({*own} & {*other} for own, other in zip(pictures, others, strict=True))
    assert 2 <= missed <= 4
    assert shuffled([("a", "b"), ("b", "a")], 0) is None  # both show both
    assert shuffled([("a",), ("b",)], 0) == [("b",), ("a",)]
    assert shuffled([("a",), ("b",), ("a",)], 0) is None and shuffled([("a",)], 0) is None
    assert shuffled([("a", "b")], 0) is None  # of no other question


def test_what_is_printed_has_counts_intervals_and_chance(seen, capsys):
    command = ["evaluate", "images", *(str(seen / name) for name in ("choices.jsonl", "talks.jsonl"))]
    assert main([*command, "--model", str(seen / "model"), "--max_new_tokens", "6"]) == 0
    said, told = capsys.readouterr()
    assert "ignored" not in told  # `task` is not
    assert "answers without a word" not in told
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0:3] for line in lines[1:]] == [
        ["| colour", "likeliest choice", "9"], ["| colour", "exact match", "9"],
        ["| choices", "likeliest choice", "9"], ["| choices", "exact match", "9"],
        ["| answers", "exact match", "9"], ["| answers", "bits per byte", "9"],
    ]  # fmt: skip
    colours = evaluate(seen, "choices.jsonl")[0]
    own, shuffled_ones = (sum(colours.likeliest(answers)) for answers in (colours.own, colours.shuffled))
    assert re.fullmatch(
        rf"\| colour \| likeliest choice \| 9 \| {own} of 9, [\d.]+% \([\d.]+% to [\d.]+%\) \| "
        rf"{shuffled_ones} of 9, .+ \| 33\.3% \|",
        lines[1],
    )


@pytest.mark.parametrize(("written", "kept"), [("<think>\n\n</think>\n\nRed.", True), ("<think>\n\n</think>", False)])
def test_thoughts_are_no_part_of_an_answer(seen, monkeypatch, capsys, written, kept):
    def answers(engine, requests):
        return (types.SimpleNamespace(text=written) for _ in requests)

    monkeypatch.setattr(Engine, "answers", answers)
    write_lines(seen / "red.jsonl", [{**ASKED, "task": "a|b\nc", "image": f"{n}.png"} for n in range(3)])
    (result,) = evaluate(seen, "red.jsonl")
    assert result.exact(result.own) == [kept] * 3
    assert ("a|b\nc: answers without a word" in capsys.readouterr().err) == (not kept)
    assert describe([result]).splitlines()[2].startswith("| a\\|b c | likeliest choice | 3 |")


def test_the_interval_is_wilsons():
    # of statsmodels' proportion_confint(method="wilson")
    for right, count, low, high in ((56, 70, 0.6918, 0.877), (0, 20, 0, 0.1611), (20, 20, 0.8389, 1)):
        assert Share(right, count).interval == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


ASKED = {"question": "which?", "choices": ["red", "blue"], "answer": "red"}
TALK = [{"role": "user", "content": "<image>which?"}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**ASKED, "image": "none.png"}, r"broken\.jsonl:2: image 1: the picture \S+none\.png cannot be read"),
        ({**ASKED, "image": "0.png", "answer": "green"}, r"broken\.jsonl:2: answer is 'green'"),
        (
            {**ASKED, "image": "0.png", "question": "<image><image>?"},
            r"broken\.jsonl:2: 1 pictures, and 2 times <image>",
        ),
        (
            {**ASKED, "images": ["0.png"], "question": "<|image_pad|>?"},
            r"broken\.jsonl:2: the text has <\|image_pad\|>",
        ),
        ({**ASKED, "image": "0.png", "choices": ["<|image_pad|>", "red"]}, r"jsonl:2: an answer has <\|image_pad"),
        ({"image": "0.png", "conversations": TALK[:1]}, r"broken\.jsonl:2: .*assistant"),
        ({"image": "0.png", "conversations": [*TALK, TALK[0]]}, r"broken\.jsonl:2: "),
    ],
)
def test_a_broken_record_is_named(seen, record, said):
    write_lines(seen / "broken.jsonl", [{**ASKED, "image": "0.png"}, record])
    with pytest.raises(UserError, match=said):
        evaluate(seen, "broken.jsonl")


def test_what_asks_about_no_picture(seen, world, capsys):
    write_lines(
        seen / "words.jsonl", [ASKED, {**ASKED, "image": "0.png"}, {**ASKED, "image": "0.png", "question": "x" * 200}]
    )
    (result,) = evaluate(seen, "words.jsonl")
    assert len(result.questions) == 1 and result.shuffled is None  # there is no other picture
    told = capsys.readouterr().err
    assert "records without a picture are left out (once)" in told and "too long for the model's context" in told
    write_lines(seen / "words.jsonl", [ASKED])
    with pytest.raises(UserError, match="no record asks about a picture"):
        evaluate(seen, "words.jsonl")
    blind = dataclasses.replace(CONFIG, vision=None)
    save_hf(seen / "blind", blind, LanguageModel(blind).init(jax.random.key(0)), Tokenizer.load(seen / "model"))
    with pytest.raises(UserError, match="reads words alone"):
        evaluate_images(EvaluateImagesConfig(model=str(seen / "blind"), files=(str(seen / "choices.jsonl"),)))
