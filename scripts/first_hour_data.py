"""Writes the data of scripts/first_hour.sh: what a small shop might have, as its tools wrote it. The same every time.

    python scripts/first_hour_data.py FOLDER

FOLDER/chats.jsonl     300 questions of customers and their answers: `messages`, as for OpenAI
FOLDER/staff.json      40 of the shop's staff: a JSON array of `instruction` and `output`, as of Alpaca
FOLDER/tickets.csv     200 tickets of 6 queues, with semicolons; FOLDER/new_tickets.csv 120 others
FOLDER/texts/          60 descriptions, a .txt file each
FOLDER/pairs.jsonl     30 questions with a better and a worse answer: `prompt`, `chosen`, `rejected`
FOLDER/chosen.jsonl, FOLDER/rejected.jsonl    the two sides of the pairs as conversations, to score them
"""

import argparse
import csv
import itertools
import json
import random
from pathlib import Path

ITEMS = (
    "kettle toaster blender lamp heater fan mixer grill juicer iron scale radio clock camera printer router speaker "
    "keyboard mouse monitor tent backpack bottle bike helmet pump torch rope stove compass desk chair shelf mirror "
    "sofa carpet curtain pillow blanket vase saw drill hammer ladder brush bucket rake spade hose mower guitar "
    "drum flute violin piano harp trumpet banjo organ cello"
).split()
MAKERS = "Aldo Brisk Corin Delta Elmo Fenn Gala Hobb Ivo Jura".split()
COLOURS = "red blue green white black grey yellow brown".split()
TOWNS = "Leeds Porto Lyon Turin Ghent Malmo Graz Cork Bern Oslo".split()
FACTS = (
    ("What does the {item} cost?", "The {item} costs {number} pounds."),
    ("Which colour is the {item}?", "Our {item} is {colour}."),
    ("Where is the {item} made?", "The {item} is made in {town}."),
    ("Who makes the {item}?", "{maker} makes the {item}."),
    ("How long is the guarantee of the {item}?", "The {item} has a guarantee of {years} years."),
)
STAFF = (
    ("Who looks after the {item} stand?", "Ask {maker} on floor {years}."),
    ("Where do we store the {item}?", "In hall {number}, near the {colour} door."),
)
QUEUES = {
    "delivery": ("My {item} has not arrived", "the parcel with the {item} is late", "tracking of my {item} ended",
                 "the courier left the {item} at the wrong door", "when will the {item} be delivered"),
    "refund": ("I want my money back for the {item}", "please refund the {item}",
               "I returned the {item} and got no refund",
               "how do I get a refund of the {item}", "still waiting for the money for the returned {item}"),
    "damage": ("The {item} arrived broken", "there is a crack in the {item}", "my {item} came scratched and bent",
               "the {item} was smashed in its box", "a part of the {item} is broken off"),
    "invoice": ("I need an invoice for the {item}", "the invoice of the {item} has a wrong address",
                "please send the bill for the {item} again", "the tax number on the {item} invoice is missing",
                "our accounting needs a copy of the {item} invoice"),
    "account": ("I cannot log in to see my {item} order", "my password is refused when I order a {item}",
                "please change the email of my account, I bought a {item}",
                "how do I reset my password for the {item}",
                "my account is locked after I ordered a {item}"),
    "advice": ("Which {item} fits a small flat", "is the {colour} {item} good for children",
               "do you recommend this {item}",
               "what is the difference between the {item} and the larger one", "which {item} would you choose"),
}  # fmt: skip
OPENINGS = ("Hello,", "Hi,", "Good morning,", "Dear team,", "Hey,", "")
ENDINGS = ("Thanks.", "Regards, {maker}", "Order {number}.", "Please answer soon.", "Bought in {town}.", "")


def slots(rng: random.Random, item: str) -> dict:
    """A value for every slot of the templates."""
    return {
        "item": item, "maker": rng.choice(MAKERS), "colour": rng.choice(COLOURS), "town": rng.choice(TOWNS),
        "number": rng.randint(11, 98), "years": rng.randint(1, 5),
    }  # fmt: skip


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def talks(rng: random.Random, templates, count: int) -> list[tuple[str, str]]:
    """Questions that differ, and their answers."""
    pairs = list(itertools.product(ITEMS, templates))
    chosen = pairs if len(pairs) == count else rng.sample(pairs, count)
    return [
        tuple(text.format(**values) for text in template) for item, template in chosen if (values := slots(rng, item))
    ]


def tickets(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(text, queue), no two texts alike."""
    found: dict[str, str] = {}
    queues = itertools.cycle(QUEUES)
    while len(found) < count:
        queue = next(queues)
        parts = (rng.choice(OPENINGS), rng.choice(QUEUES[queue]) + ".", rng.choice(ENDINGS))
        text = " ".join(part for part in parts if part).format(**slots(rng, rng.choice(ITEMS)))
        found.setdefault(text, queue)
    return list(found.items())


def descriptions(rng: random.Random, count: int) -> list[str]:
    texts = []
    for item in rng.sample(ITEMS, count):
        values = slots(rng, item)
        lines = [answer.format(**values) for _, answer in FACTS]
        rng.shuffle(lines)
        texts.append(" ".join(lines))
    return texts


def pairs(rng: random.Random, count: int) -> list[dict]:
    """The better answer is friendly, the worse one curt."""
    return [
        {"prompt": question, "chosen": f"With pleasure! {answer}", "rejected": f"{answer} Look it up yourself."}
        for question, answer in talks(rng, FACTS, count)
    ]


def write_lines(path: Path, records: list) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=";").writerows([("body", "category"), *rows])


def write_all(folder: Path) -> None:
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    write_lines(folder / "chats.jsonl", [chat(*talk) for talk in talks(rng, FACTS, 300)])
    staff = [{"instruction": question, "input": "", "output": answer} for question, answer in talks(rng, STAFF, 40)]
    (folder / "staff.json").write_text(json.dumps(staff, indent=1), "utf-8")
    made = tickets(rng, 320)
    write_table(folder / "tickets.csv", made[:200])
    write_table(folder / "new_tickets.csv", made[200:])
    for number, text in enumerate(descriptions(rng, 60), 1):
        (folder / "texts" / f"{number:02}.txt").write_text(text + "\n", "utf-8")
    made = pairs(rng, 30)
    write_lines(folder / "pairs.jsonl", made)
    for side in ("chosen", "rejected"):
        write_lines(folder / f"{side}.jsonl", [chat(pair["prompt"], pair[side]) for pair in made])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_all(parser.parse_args().folder)
