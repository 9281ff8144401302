"""Real text that any machine can get from Python itself and PyPI: what the demo trains on.

Pretraining: `pydoc_data.topics` (Python's language reference, about half a megabyte), the docstrings of the standard
library, and the dialogues as plain text, so that Chinese is seen too. Fine-tuning: the English and Chinese dialogues of
the `chatterbot-corpus` package (BSD licence).
"""

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from minimind_jax.shell import needing

LANGUAGES = ("english", "chinese")
# Files whose longer lists are a question and several answers to it; elsewhere they are turns of one conversation.
ANSWER_LISTS = ("computers", "emotion")
# Folders of the standard library that hold no documentation of it.
NO_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SHORTEST_DOCSTRING = 40


def topics() -> list[str]:
    """The chapters of Python's language reference that come with its `help`."""
    import pydoc_data.topics

    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def docstrings() -> Iterator[str]:
    """`module.name`, a blank line and the docstring, for every documented definition of the standard library.

    The files are parsed, never imported. The same docstring is given once.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    seen = set()
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if NO_DOCUMENTATION & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, text in _documented(file, module):
            if len(text) >= SHORTEST_DOCSTRING and text not in seen:
                seen.add(text)
                yield f"{name}\n\n{text}"


def _documented(file: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a few files of the library are templates or tests of the parser
        return

    def walk(node, prefix):
        text = ast.get_docstring(node)
        if text:
            yield prefix, text
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, f"{prefix}.{child.name}")

    yield from walk(tree, module)


def dialogues(language: str) -> list[list[str]]:
    """The dialogues of one language, each a list of turns that begins with a question and ends with an answer.

    In ChatterBot's files a line answers the one before it; in `ANSWER_LISTS` all lines answer the first, and become a
    dialogue each. A last question without an answer is left out, and so are repetitions.
    """
    with needing("the demo's dialogues are missing", "demo"):
        import chatterbot_corpus
    found, folder = {}, Path(chatterbot_corpus.__file__).parent / "data" / language
    for file in sorted(folder.glob("*.yml")):
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(lines, list):  # one entry of the trivia file lost its dash
                continue
            turns = [str(line).strip() for line in lines]
            chains = [[turns[0], answer] for answer in turns[1:]] if file.stem in ANSWER_LISTS else [turns]
            for chain in chains:
                chain = chain[: len(chain) // 2 * 2]
                if chain and all(chain):
                    found[tuple(chain)] = None
    return [list(chain) for chain in found]


def questions(chains: list[list[str]]) -> dict[tuple[str, ...], set[str]]:
    """Every question with the turns before it, and all answers the dialogues give to it."""
    answers: dict[tuple[str, ...], set[str]] = {}
    for chain in chains:
        for turn in range(1, len(chain), 2):
            answers.setdefault(tuple(chain[:turn]), set()).add(chain[turn])
    return answers


def messages(turns: list[str] | tuple[str, ...]) -> list[dict]:
    """Turns as messages, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def write_data(folder: Path) -> tuple[Path, Path]:
    """pretrain.jsonl and sft.jsonl in `folder`, written unless they are there."""
    files = folder / "pretrain.jsonl", folder / "sft.jsonl"
    if not all(file.is_file() for file in files):
        chains = [chain for language in LANGUAGES for chain in dialogues(language)]
        texts = [*topics(), *docstrings(), *("\n".join(chain) for chain in chains)]
        folder.mkdir(parents=True, exist_ok=True)
        _write_records(files[0], ({"text": text} for text in texts))
        _write_records(files[1], ({"conversations": messages(chain)} for chain in chains))
    return files


def _write_records(path: Path, records: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
