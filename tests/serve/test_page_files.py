"""The files of the chat page, without a browser."""

import json
import re
from pathlib import Path

import minimind_jax

PAGE = Path(minimind_jax.__file__).parent / "serve" / "page"


def test_files_of_the_page():
    """Nothing comes from elsewhere, no script stands in the page, and it stays small."""
    own = [file for file in PAGE.rglob("*") if file.suffix in {".js", ".html", ".css"} and file.parent.name != "vendor"]
    text = {file.name: file.read_text("utf-8") for file in own}
    for name, words in text.items():
        assert not re.search(r"https?://(?!www\.w3\.org)|@import|\beval\(|innerHTML|new Function|\son\w+=\"", words), (
            name
        )
    assert not re.search(r"<script>|style=", text["index.html"])
    assert max(words.count("\n") for words in text.values()) < 300
    vendored = list((PAGE / "vendor").glob("*.js"))
    assert sum(file.stat().st_size for file in vendored) < 400_000
    assert all(file.with_suffix(".LICENSE").is_file() for file in vendored)


def test_every_word_is_there_in_both_languages():
    words = (PAGE / "js" / "words.js").read_text("utf-8")
    table = words[words.index("const WORDS") : words.index("};")]
    pairs = dict(re.findall(r"^  (\w+): \[(.*?)\],$", table, re.M | re.S))
    assert len(pairs) == table.count(": [")
    for name, pair in pairs.items():
        english, chinese = json.loads(f"[{pair.strip().rstrip(',')}]")
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    said = set()
    for file in [*PAGE.glob("js/*.js"), PAGE / "index.html"]:
        found = re.findall(r"(?:say\(|data-(?:text|label|hint)=|wordButton\()\"(\w+)\"", file.read_text("utf-8"))
        said |= set(found)
    assert len(said) > 50 and said <= pairs.keys()
