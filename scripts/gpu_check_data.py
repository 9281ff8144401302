"""Data for `gpu_check.py`, out of Python's own documentation: texts, questions about it, and drawn pictures.

python scripts/gpu_check_data.py FOLDER
"""

import importlib.util
import io
import json
import random
import sys
from pathlib import Path

from minimind_jax.demo import corpus

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (235, 220, 60)}
COUNT = 400  # of conversations, and of pictures
PICTURES = ("pyarrow", "PIL")  # what pictures need


def turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_texts(folder: Path) -> None:
    told = list(corpus.docstrings())
    texts = [{"text": text} for text in [*corpus.topics(), *told]]
    pairs = [text.split("\n\n", 1) for text in told[:: max(1, len(told) // COUNT)]]
    chats = [{"conversations": turns(f"What is {name}?", text[:200])} for name, text in pairs]
    for name, records in (("texts", texts), ("chats", chats)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_pictures(file: Path) -> None:
    """In MiniMind-V's format."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    talks, images = [], []
    for number in range(COUNT):
        name, colour = random.Random(number).choice(list(COLOURS.items()))
        picture = io.BytesIO()
        Image.new("RGB", (256, 256), colour).save(picture, "JPEG")
        talks.append(json.dumps(turns("<image>\nWhich colour?", f"It is {name}.")))
        images.append(picture.getvalue())
    pyarrow.parquet.write_table(pyarrow.table({"conversations": talks, "image_bytes": images}), file)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder)
    if all(map(importlib.util.find_spec, PICTURES)):
        write_pictures(folder / "pictures.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
