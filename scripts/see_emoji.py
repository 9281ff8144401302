"""Seeing that can be counted on two cores: two million parameters learn to look at emoji, and are asked about others.

    python scripts/see_emoji.py --pictures emoji_i2t.parquet --held_out vlm_emoji_i2t.parquet --texts texts.jsonl \
      --out runs/see_emoji
    python scripts/see_emoji.py ... --seed 1

A tokenizer and a model of texts are trained on --texts, and a SigLIP tower is drawn. Both learn to see from scenes
made of the emoji in --pictures (MiniMind-V's Parquet, two records an emoji): one to four of it, turned, mirrored, of
other sizes and places. First scenes are described in three words (`vlm-pretrain`), then asked about (`vlm-sft`). The
questions of questions.jsonl are about the emoji of --held_out, none of which was ever seen: what kind of thing it is,
which colour it has, and how many there are in a scene. `minimind evaluate images` asks them.

Prints its tables, of the captions first. What is done is not done again. All data are pure functions of seeds;
minutes differ. --texts are trained on for a fixed number of steps: `shuf -n 9000 pretrain.jsonl` is enough of them.
"""

import argparse
import colorsys
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from minimind_jax.convert.hf import save_hf
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.model.config import ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel

SIDE = 64  # pixels of a scene
TOWER = TowerConfig(128, 384, 4, 4, SIDE, 16, resample=2)  # 16 tokens an image
CAPTION = "This is an icon of "
# Words in the names of emoji, by what these are.
KINDS = {
    "face": "",
    "animal": r"""
        cricket dog zebra rat unicorn tiger turtle honeybee worm ewe flamingo sauropod eagle lizard turkey
        bug skunk cat llama penguin octopus whale mouse snail mosquito sloth chick cow boar monkey cockroach
        ram swan donkey bird camel koala peacock otter raccoon snake goose rooster crab badger giraffe
        parrot lion bear wolf ox poodle shark gorilla pig butterfly leopard dragon jellyfish moose deer
        beetle blowfish rabbit T-Rex chicken hedgehog rhinoceros kangaroo dodo crocodile goat fish horse
        hamster fox dolphin duck fly squid
    """,
    "food": r"""
        kiwi salad oyster curry broccoli oden cucumber rice apple shrimp cookie grapes doughnut beans
        watermelon blueberries olive tangerine fries cake potato dango mango food melon butter ice\scream
        bagel meat poultry cracker ginger banana custard salt tamale corn pineapple dumpling pizza hamburger
        coconut bread avocado lemon pepper falafel flatbread spaghetti bacon sushi pea cherries taco
        croissant pretzel pancakes popcorn shaved peach pie onion strawberry carrot lollipop cupcake
        sandwich chocolate baguette bento mushroom
    """,
    "vehicle": r"""
        locomotive motor\sscooter sport\sutility metro bus police\scar automobile tram train trolleybus
        rickshaw ship canoe monorail taxi pickup minibus kick\sscooter speedboat railway fire\sengine
        tractor ambulance bullet rail
    """,
}
NAMES_OF_OTHERS = ("mouse trap", "flying saucer", "horse racing", "hot dog")
COLOURS = ("red", "orange", "yellow", "green", "blue", "brown", "grey")


class Emoji(NamedTuple):
    """content: of the picture's file. talks: about it, in Chinese and in English. kind, colour: "" for none of ours."""

    image: Image.Image
    content: bytes
    talks: list[list[dict[str, str]]]
    name: str
    kind: str
    colour: str


# Emoji and scenes -----------------------------------------------------------------------------------------------------


def read_emoji(file: Path) -> list[Emoji]:
    rows, found = pq.read_table(file).to_pylist(), []
    for chinese, english in zip(rows[::2], rows[1::2], strict=True):
        talks = [json.loads(row["conversations"]) for row in (chinese, english)]
        name = talks[1][1]["content"].removeprefix(CAPTION).removesuffix(".")
        image = Image.open(io.BytesIO(english["image_bytes"])).convert("RGB")
        found.append(Emoji(image, english["image_bytes"], talks, name, kind_of(name), colour_of(image)))
    return found


def kind_of(name: str) -> str:
    if name in NAMES_OF_OTHERS:
        return ""
    for kind in ("animal", "vehicle", "food"):
        if any(re.search(rf"\b{word}\b", name) for word in KINDS[kind].split()):
            return kind
    return "face" if "face" in name and not re.search("moon|wind|sun with|facing", name) else ""


def colour_of(image: Image.Image) -> str:
    """That of three fifths of what is not white, if there is one."""
    counts = Counter(map(_colour, np.asarray(image.resize((48, 48))).reshape(-1, 3).tolist()))
    counts.pop("white", None)
    (name, count), total = counts.most_common(1)[0], counts.total()
    return name if count / total > 0.6 and name in COLOURS else ""


def _colour(pixel: Iterable[int]) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
    hue *= 360
    if saturation < 0.22 or value < 0.22:
        return "white" if value > 0.9 else "grey"
    if hue < 20 or hue >= 335:
        return "red" if value > 0.7 else "brown"
    if hue < 50:
        return ("orange" if hue < 36 else "yellow") if value > 0.8 else "brown"
    limits = ((70, "yellow"), (170, "green"), (255, "blue"))
    return next((name for limit, name in limits if hue < limit), "purple")


def scene(emoji: Emoji, count: int, draw: random.Random) -> bytes:
    """So many of the emoji, as a PNG."""
    side, ground = 2 * SIDE, (255, 255, 255)
    if draw.random() < 0.5:
        ground = tuple(draw.randrange(225, 256) for _ in range(3))
    image = ImageOps.mirror(emoji.image) if draw.random() < 0.5 else emoji.image
    canvas = Image.new("RGB", (side, side), ground)
    if count == 1:
        size = int(side * draw.uniform(0.7, 1))
        places = [(draw.randrange(side - size + 1), draw.randrange(side - size + 1))]
    else:
        half = side // 2
        size = int(half * draw.uniform(0.8, 1))
        cells = draw.sample([(0, 0), (0, half), (half, 0), (half, half)], count)
        places = [(x + draw.randrange(half - size + 1), y + draw.randrange(half - size + 1)) for x, y in cells]
    small = image.rotate(draw.uniform(-12, 12), fillcolor=(255, 255, 255)).resize((size, size))
    small = Image.fromarray((np.asarray(small).astype(float) / 255 * np.array(ground)).astype(np.uint8))
    for place in places:
        canvas.paste(small, place)
    stream = io.BytesIO()
    canvas.resize((SIDE, SIDE)).save(stream, "PNG")
    return stream.getvalue()


# Records --------------------------------------------------------------------------------------------------------------


def write_captions(emoji: list[Emoji], file: Path, views: int = 32) -> None:
    """How many, which colour, what kind of thing: three words of each scene."""
    draw, emoji, rows = random.Random(5), list(emoji), []
    for _ in range(views):
        draw.shuffle(emoji)
        for one in emoji:
            count = 1 if draw.random() < 0.4 else draw.randrange(1, 5)
            said = f"{count} {one.colour or 'mixed'} {one.kind or 'thing'}"
            rows.append(_row(scene(one, count, draw), [("<image>", said)]))
    pq.write_table(pa.Table.from_pylist(rows), file)


def write_talks(emoji: list[Emoji], file: Path) -> None:
    """Up to three questions about each scene."""
    pq.write_table(pa.Table.from_pylist(talks(emoji, views=8)), file)


def talks(emoji: list[Emoji], views: int, names: bool = False) -> list[dict[str, Any]]:
    draw, emoji, rows = random.Random(0), list(emoji), []
    for _ in range(views):
        draw.shuffle(emoji)
        for one in emoji:
            count = 1 if draw.random() < 0.5 else draw.randrange(1, 5)
            asked = questions(one, count, draw, names)
            turns = [asked[name] for name in draw.sample(list(asked), min(len(asked), 3))]
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            rows.append(_row(scene(one, count, draw), turns))
    return rows


def write_words(emoji: list[Emoji], file: Path, count: int = 3000) -> None:
    """Such talks and the names of the emoji, for a tokenizer."""
    rows = talks(emoji, views=-(-count // len(emoji)), names=True)[:count]
    write(file, ({"conversations": json.loads(row["conversations"].replace("<image>", ""))} for row in rows))


def questions(one: Emoji, count: int, draw: random.Random, names: bool) -> dict[str, tuple[str, str]]:
    """What is asked about a scene, and the answer; with its name in the words of the data, too."""
    found = {}
    if names:
        asked, said = (message["content"] for message in draw.choice(one.talks))
        found["name"] = (asked.replace("<image>", "").strip(), said)
    found["count"] = (HOW_MANY, str(count))
    if one.colour:
        found["colour"] = (WHICH_COLOUR, one.colour)
    agrees, others = draw.random() < 0.5, [kind for kind in KINDS if kind != one.kind]
    if one.kind and agrees:
        found["kind"] = (IS_THIS.format(one.kind), "yes")
    elif draw.random() < (1 if one.kind else 0.4):
        found["kind"] = (IS_THIS.format(draw.choice(others)), "no")
    return found


HOW_MANY, WHICH_COLOUR, IS_THIS = "How many are there?", "Which colour is it?", "Is this a {}?"


def _row(content: bytes, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"image_bytes": content, "conversations": json.dumps(messages, ensure_ascii=False)}


def write_questions(held_out: list[Emoji], folder: Path) -> None:
    """questions.jsonl, for who learned to answer, and captions.jsonl, where a choice differs from the caption by one
    word; and their pictures beside them."""
    draw, records, captions = random.Random(1), [], []

    def ask(task: str, image: str, question: str, choices: Iterable[str], answer: str) -> None:
        asked = {"image": image, "task": task, "question": f"<image>\n{question}" if question else "<image>"}
        (records if question else captions).append({**asked, "choices": list(choices), "answer": answer})

    for n, one in enumerate(held_out):
        image, colour, kind = f"{n}.jpg", one.colour or "mixed", one.kind or "thing"
        (folder / image).write_bytes(one.content)
        if one.colour:
            ask("colour", image, WHICH_COLOUR, COLOURS, colour)
            ask("colour", image, "", (f"1 {other} {kind}" for other in COLOURS), f"1 {colour} {kind}")
        for count in range(1, 5):
            several = f"{n}-{count}.png"
            (folder / several).write_bytes(scene(one, count, draw))
            ask("count", several, HOW_MANY, "1234", str(count))
            ask("count", several, "", (f"{other} {colour} {kind}" for other in range(1, 5)), f"{count} {colour} {kind}")
        if one.kind:
            other = draw.choice([kind for kind in KINDS if kind != one.kind])
            ask("kind", image, IS_THIS.format(one.kind), ("yes", "no"), "yes")
            ask("kind", image, IS_THIS.format(other), ("yes", "no"), "no")
            ask("kind", image, "", (f"1 {colour} {other}" for other in KINDS), f"1 {colour} {kind}")
    write(folder / "questions.jsonl", records)
    write(folder / "captions.jsonl", captions)


def write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_text("".join(lines), "utf-8")


# Runs -----------------------------------------------------------------------------------------------------------------

LINEAR = {
    "export_dtype": "float32", "checkpoint.every": 0, "optimizer.name": "muon", "optimizer.schedule": "linear",
    "optimizer.final_fraction": 0,
}  # fmt: skip
WORDS = {
    **LINEAR, "data.seq_len": 128, "training.batch_tokens": 2048, "training.steps": 350, "training.eval_every": 0,
    "optimizer.learning_rate": 4e-3, "optimizer.muon_learning_rate": 1e-2, "init_from": "",
    "model.hidden_size": 128, "model.intermediate_size": 384, "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "model.max_position_embeddings": 512,
}  # fmt: skip
SEEING = {  # with the empty thought behind which models are asked for answers
    **LINEAR, "vision.train": "tower", "data.seq_len": 192, "data.val_fraction": 0.01, "training.batch_tokens": 1536,
    "optimizer.weight_decay": 0.01, "data.empty_think_removal": 0,
}  # fmt: skip
CAPTIONS = {
    **SEEING, "training.steps": 900, "optimizer.learning_rate": 2e-3, "optimizer.muon_learning_rate": 2e-2,
}  # fmt: skip
TALKS = {**SEEING, "training.steps": 350, "optimizer.learning_rate": 5e-4, "optimizer.muon_learning_rate": 5e-3}


def minimind(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "minimind_jax", *map(str, words)], check=True)


def train(stage: str, run: Path, settings: dict[str, Any]) -> None:
    if not (run / "model").is_dir():
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        minimind(stage, "--run", run, *options)


def write_tower(folder: Path, tokenizer: Tokenizer) -> None:
    """A tower drawn at random, in a model that is no use but to hold it."""
    marker = tokenizer.vocabulary()["<|image_pad|>"]
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, vision=Vision(TOWER, marker),
    )  # fmt: skip
    save_hf(folder, config, jax.jit(LanguageModel(config).init)(jax.random.key(0)), tokenizer, "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help='records {"text": ...}')
    parser.add_argument("--out", type=Path, default=Path("runs/see_emoji"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    out, seed = args.out, args.seed
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "questions.jsonl").is_file():
        emoji = read_emoji(args.pictures)
        write_captions(emoji, out / "captions.parquet")
        write_talks(emoji, out / "talks.parquet")
        write_words(emoji, out / "words.jsonl")
        write_questions(read_emoji(args.held_out), out)
    tokenizer = out / "tokenizer"
    if not tokenizer.is_dir():
        files = args.texts, out / "words.jsonl"
        minimind("tokenizer", "--data", *files, "--output", tokenizer, "--vocab_size", 3072, "--max_records", 9000)
        write_tower(out / "tower", Tokenizer.load(tokenizer))
    train("pretrain", out / "words", {**WORDS, "tokenizer": tokenizer, "data.train": args.texts})
    seen = {"init_from": out / "words", "vision.tower": out / "tower", "data.train": out / "captions.parquet"}
    train("vlm-pretrain", out / f"captions-{seed}", {**CAPTIONS, **seen, "seed": seed})
    asked = {"init_from": out / f"captions-{seed}", "data.train": out / "talks.parquet"}
    train("vlm-sft", out / f"talks-{seed}", {**TALKS, **asked, "seed": seed})
    for file, run in (("captions.jsonl", f"captions-{seed}"), ("questions.jsonl", f"talks-{seed}")):
        minimind("evaluate", "images", out / file, "--model", out / run)


if __name__ == "__main__":
    main()
