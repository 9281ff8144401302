"""Files of text: JSON arrays and pretty-printed JSON, tables with any separator, documents, encodings."""

import gzip
import json

import pytest

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data import text_files
from minimind_jax.data.formats import read_text
from minimind_jax.data.jsonl import expand_paths, iter_records, tell_left_out
from minimind_jax.errors import UserError

ROWS = [{"text": "one, {two}", "n": 1}, {"text": "两行\n]", "n": {"a": [1]}}, {"text": "three", "n": None}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(file, encoding="utf-8"):
    return [(record.line, record.value) for record in iter_records([file], reading=ReadingConfig(encoding=encoding))]


PRETTY = "".join(json.dumps(row, ensure_ascii=False, indent=2) + "\n" for row in ROWS)
FORMS = {
    "array in a line": (json.dumps(ROWS), ["1, record 1", "1, record 2", "1, record 3"]),
    "array, two in a line": (
        "[\n" + json.dumps(ROWS[0]) + ", " + json.dumps(ROWS[1:])[1:],
        [2, "2, record 2", "2, record 3"],
    ),
    "pretty array": (json.dumps(ROWS, indent=2), [2, 6, 14]),
    "array, a row a line": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", [2, 3, 4]),
    "pretty objects": (PRETTY, [1, 5, 13]),
    "lines": (lines(ROWS), [1, 2, 3]),
    "blank lines before": ("\n\n" + json.dumps(ROWS, indent=2), [4, 8, 16]),
}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [7, 1 << 20], ids=["piece by piece", "at once"])
def test_json_is_told_by_what_it_holds(tmp_path, form, ending, block, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    text, where = FORMS[form]
    file = tmp_path / f"a{ending}"
    data = text.encode("utf-8-sig")
    file.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    assert read(file) == list(zip(where, ROWS, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n {"text": "a"},\n {"text": "b"\n', r"a\.json:3: the record that begins here is not JSON: .*line 4"),
        ('[\n {"text": "a"},\n {"text": b}\n]\n', r"a\.json:3: .* in line 3 at column 11; expected a JSON array"),
        ('[\n {"text": "a"}\n', r"a\.json:\d: the file ends in the middle of a JSON array"),
        ('[\n {"text": "a"},\n 5\n]\n', r"a\.json:3: a JSON int; expected an object"),
        ('[\n {"text": NaN}\n]\n', r"a\.json:2: not readable JSON: NaN"),
        ("[]", r"a\.json: the file is empty"),
        ('[{"text": "a"}, 5]', r"a\.json:1, record 2: a JSON int; expected an object"),
        ('[{"text": "a"},{"text": "b"},{"n": NaN}]', r"a\.json:1, record 3: not readable JSON: NaN"),
    ],
)  # fmt: skip
def test_broken_arrays_name_the_line_and_the_record_of_several_in_one(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "end",
    ["{", "", '{"text": "今', '{"text": tr', '{"text": "a\\', '{"text": c}\n]', b'{"text": "\xe4\xbb'],
)
def test_the_records_before_a_broken_end_of_an_array_are_kept(tmp_path, end):
    """Cut off between records, within one, in a character; or a last one that is no JSON. One that others may follow
    in its line stays an error: they would be lost with it."""
    end, file = end if isinstance(end, bytes) else end.encode(), tmp_path / "a.json"
    for between in (",", ",\n", ",\n "):
        if b"]" in end and "\n" not in between:
            continue
        file.write_bytes(f'[{between[1:]}{{"text": "a"}}{between}{{"text": "b"}}{between}'.encode() + end)
        errors: list = []
        assert [r.value["text"] for r in iter_records([file], errors.append)] == ["a", "b"]
        assert len(errors) == 1
        place = "4" if len(between) > 1 else "1, record 3" if end else "1"
        with pytest.raises(UserError, match=rf"json:{place}: .*record [23]"):
            read(file)
    file.write_text('[{"text": "a"},{"text": b},{"text": "c"}]')
    with pytest.raises(UserError, match="this is record 2 of the file"):
        list(iter_records([file], errors.append))


MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_line_that_is_a_list_of_messages_is_a_conversation(tmp_path, ending):
    """As nanochat has them. An array of other records is none, though it be in one line."""
    file = tmp_path / f"a{ending}"
    file.write_text(f"{json.dumps(MESSAGES)}\n" * 2)
    assert read(file) == [(1, {"messages": MESSAGES}), (2, {"messages": MESSAGES})]
    rows = [{"text": "a", "role": "user"}, {"text": "b"}]
    file.write_text(json.dumps(rows))
    assert [value for _, value in read(file)] == rows


def test_a_message_by_itself_is_no_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(MESSAGES, indent=1))
    first = next(iter_records([tmp_path / "a.json"]))
    with pytest.raises(UserError, match=r"a\.json:2: a message by itself.*data\.text_field content"):
        read_text(first, ReadingConfig())
    assert read_text(first, ReadingConfig(text_field="content")) == ("1 + 1?", "content")


TABLE = [("text", "label"), ('a "b", c; d', "x"), ("one\ntwo", "y|z"), ("tab\there", "x")]


@pytest.mark.parametrize("head", ["", "\ufeff", "sep={}\r\n", "\ufeffsep={}\n"], ids=["plain", "mark", "sep", "both"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_with_any_separator(tmp_path, separator, head):
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(TABLE)
    file = tmp_path / "a.csv"
    file.write_bytes((head.format(separator) + text.getvalue()).encode())
    found = read(file)
    assert [tuple(value.values()) for _, value in found] == TABLE[1:]
    assert [tuple(value) for _, value in found] == [TABLE[0]] * 3
    assert [line - found[0][0] for line, _ in found] == [0, 2, 3]


def test_a_tsv_is_separated_by_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\none, two, three\tx\n")
    assert read(tmp_path / "a.tsv") == [(2, {"text": "one, two, three", "label": "x"})]


def test_a_separator_that_a_cell_has_too(tmp_path):
    (tmp_path / "a.csv").write_text(' text ; label\n"a, b, c";x\nd, e, f;y\n')
    assert [value for _, value in read(tmp_path / "a.csv")] == [
        {"text": "a, b, c", "label": "x"},
        {"text": "d, e, f", "label": "y"},
    ]


def test_a_table_of_one_column_needs_quotes_around_commas(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"one, two"\nthree\n')
    assert [value["text"] for _, value in read(tmp_path / "a.csv")] == ["one, two", "three"]
    (tmp_path / "a.csv").write_text("text\none, two\n")
    with pytest.raises(UserError, match="more columns than the header"):
        read(tmp_path / "a.csv")


def test_a_file_is_a_document(tmp_path):
    (tmp_path / "b.md").write_text("---\ntitle: x\n---\n# Head\n", "utf-8-sig")
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    records = list(iter_records([tmp_path]))
    assert [r.value for r in records] == [
        {"text": "one\n\ntwo\n"},
        {"text": "---\ntitle: x\n---\n# Head\n"},
        {"text": "three"},
    ]
    assert [r.value for r in iter_records([tmp_path / "a.txt"], reading=ReadingConfig(text_field="t"))] == [
        {"t": "one\n\ntwo\n"}
    ]


def test_what_describes_a_data_set_is_not_its_data(tmp_path, capsys):
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "train.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in expand_paths([tmp_path])] == ["notes.md", "train.jsonl"]
    (tmp_path / "more.xlsx").touch()
    tell_left_out([tmp_path, tmp_path / "train.jsonl"])
    told = capsys.readouterr().err
    assert "more.xlsx" not in told and "LICENSE.txt" in told and "README.md" in told and "and 1 more" in told
    (tmp_path / "train.jsonl").unlink()
    assert "README.md" in [file.name for file in expand_paths([tmp_path])]


CHINESE = [{"text": "今天天气很好，我们去公园散步。"}]


@pytest.mark.parametrize(
    ("encoding", "guess"), [("gb18030", "gb18030"), ("gbk", "gb18030"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16")]
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_encodings_are_read_by_name_and_guessed_for_the_message_only(tmp_path, encoding, guess, ending):
    file = tmp_path / f"a{ending}"
    text = {
        ".jsonl": lines(CHINESE),
        ".json": json.dumps(CHINESE, indent=1, ensure_ascii=False),
        ".csv": "text\n" + CHINESE[0]["text"] + "\n",
        ".txt": CHINESE[0]["text"],
    }
    file.write_text(text[ending], encoding)
    assert [value for _, value in read(file, encoding)] == CHINESE
    with pytest.raises(UserError, match=guess if encoding != "utf-16-le" else "UTF-16|utf-16|not"):
        read(file)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_latin_1(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    file.write_text({".jsonl": '{"text": "grün und blöd"}\n', ".csv": "text\ngrün und blöd\n"}[ending], "latin-1")
    assert [value["text"] for _, value in read(file, "latin-1")] == ["grün und blöd"]
    with pytest.raises(UserError, match=r"it looks like latin-1: set data\.encoding latin-1"):
        read(file)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz"])
def test_utf_8_that_is_read_as_another_encoding_is_told_once(tmp_path, capsys, ending, monkeypatch):
    """Also where the first character that is none of ASCII comes late, or a block ends within it."""
    monkeypatch.setattr(text_files, "_BLOCK", 40)
    for name, text, is_told in [("late", "a" * 99 + "今天天气", "utf-8"), ("right", "今天", ""), ("ascii", "abc", "")]:
        file = tmp_path / f"{name}{ending}"
        form = {".csv": f"text\n{text}\n", ".txt": text}.get(ending, json.dumps([{"text": text}], ensure_ascii=False))
        data = form.encode(is_told or "gb18030")
        file.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
        for _ in range(2):
            assert len(read(file, "gb18030")) == 1
        told = capsys.readouterr().err
        assert told.count(f"{file} is UTF-8 text, and is read as gb18030") == bool(is_told), told


def test_another_encoding_than_the_file_s_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(CHINESE), "utf-16")
    with pytest.raises(UserError, match="cannot be read as gbk"):
        read(tmp_path / "a.jsonl", "gbk")
    for name in ("gkb", "base64"):  # the latter is of bytes
        with pytest.raises(ValueError, match=rf"encoding is '{name}'; it must be a name such as utf-8"):
            ReadingConfig(encoding=name)


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_broken_element_of_an_array_is_one_record(tmp_path, indent, monkeypatch):
    """The next one begins where a line begins as its own does, also when blocks of text end within elements."""
    monkeypatch.setattr(text_files, "_BLOCK", 40)
    rows = [{"text": "a", "messages": [{"role": "user"}, {"role": "assistant"}]} for _ in range(4)]
    elements = [json.dumps(row, indent=indent) for row in rows]
    if indent != 0:
        elements[1] = elements[1].replace('"a"', "a")
    text = "[\n" + ",\n".join(" " * bool(indent) + element for element in elements) + "\n]"
    (tmp_path / "a.json").write_text(text)
    errors = []
    found = [record.value for record in iter_records([tmp_path / "a.json"], errors.append)]
    assert found == rows[: 4 if indent == 0 else 3]
    assert all("the record that begins here is not JSON: Expecting value in line" in str(error) for error in errors)
    assert len(errors) == (indent != 0)


def test_what_excel_leaves_in_tables(tmp_path):
    """Columns without a name, rows without a value, and names in capitals."""
    (tmp_path / "A.CSV").write_bytes(b'\xef\xbb\xbftext;label;;\r\n"a; b";x;;\r\n;;;\r\n\r\n')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}')
    named = {"text": "a; b", "label": "x", "Unnamed: 2": "", "Unnamed: 3": ""}
    assert [record.value for record in iter_records([tmp_path])] == [named, {"text": "c"}]


@pytest.mark.parametrize("ending", ["csv", "txt", "jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
@pytest.mark.parametrize(
    ("written", "encoding"), [("utf-16-le", "utf-16"), ("utf-16-be", "utf-16"), ("utf-16-le", "utf-16-le")]
)
def test_utf_16_with_and_without_a_mark(tmp_path, ending, mark, written, encoding):
    file = tmp_path / f"a.{ending}"
    text = {"csv": "text,n\nab c,1\n", "txt": "ab c", "jsonl": '{"text": "ab c"}\n'}[ending]
    file.write_bytes((mark + text).encode(written))
    assert [r.value["text"] for r in iter_records([file], reading=ReadingConfig(encoding=encoding))] == ["ab c"]
    with pytest.raises(UserError, match=r"data\.encoding utf-16"):
        list(iter_records([file]))
