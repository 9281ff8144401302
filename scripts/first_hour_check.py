"""Figures of scripts/first_hour.sh: `first_hour_check.py WHAT LEAST FILES ...` prints a share and fails below LEAST.

answers RECORDS ANSWERS     of the records' answers, word for word
labels TABLE ANSWERS        of the labels in a table
order BETTER WORSE          of the scores, how often the first file's is the higher
metric NAME METRICS         the last value of a metric
"""

import csv
import json
import sys
from pathlib import Path


def rows(name: str) -> list[dict]:
    text = Path(name).read_text("utf-8")
    if name.endswith(".csv"):
        return list(csv.DictReader(text.splitlines(), delimiter=";"))
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


def answer(record: dict) -> str:
    return record["output"] if "output" in record else record["messages"][-1]["content"]


def measure(what: str, first: str, second: str) -> float:
    if what == "metric":
        return [row[first] for row in rows(second) if first in row][-1]
    pairs = list(zip(rows(first), rows(second), strict=True))
    if what == "answers":
        return share([answer(record) == made["completion"].strip() for record, made in pairs])
    if what == "labels":
        return share([record["category"] == made["predicted"] for record, made in pairs])
    return share([better["score"] > worse["score"] for better, worse in pairs])


if __name__ == "__main__":
    what, least, *files = sys.argv[1:]
    found = measure(what, *files)
    print(f"==> {' '.join([what, *files])}: {found:.1%}, at least {float(least):.0%} asked for", flush=True)
    sys.exit(found < float(least))
