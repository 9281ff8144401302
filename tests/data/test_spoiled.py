"""Text that was spoiled before it came here: read in a wrong encoding, characters lost."""

import json

import pytest

from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.text_files import spoiled
from minimind_jax.errors import UserError
from tests.data.format_helpers import write


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", ["für", "“quoted”", "l’été", "привет", "你好", "Straße"])
def test_text_that_was_read_in_a_wrong_encoding(text, encoding):
    wrong = "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode())
    assert any("wrong encoding" in note for note in spoiled(wrong))
    assert not list(spoiled(text))


def test_cp1252_that_was_read_as_latin_1():
    assert list(spoiled("5 €".encode("cp1252").decode("latin-1")))


@pytest.mark.parametrize(
    "text", ["« déjà » vu", "NÃO", "é”…", "20 °C", "naïve – Ærø", "ESPAÑA", "a\x85b", "中文，好。"]
)
def test_right_text_is_not_told(text):
    assert not list(spoiled(text))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_spoiled_records_are_counted(tmp_path, ending):
    texts = ["gr\u00c3\u00bcn", "caf\ufffd", "fine"]
    content = {
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),  # escaped, as Python's json writes it
        "csv": "text\n" + "\n".join(texts),
        "txt": " ".join(texts),
    }
    found = list(iter_records([write(tmp_path / f"a.{ending}", content[ending])]))
    assert sorted(found[0].told.values()) == [1, 1]


@pytest.mark.parametrize(("text", "guess"), [("für Grüße", "latin-1"), ("für 5 € – “so”", "cp1252")])
def test_the_encoding_that_is_proposed(tmp_path, text, guess):
    with pytest.raises(UserError, match=f"looks like {guess}: set data.encoding {guess}"):
        list(iter_records([write(tmp_path / "a.csv", f"text,label\r\n{text},a\r\n", "cp1252")]))
