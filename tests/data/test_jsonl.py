"""Files of records: formats, places in messages, and what is said about broken ones."""

import gzip
import json
import os

import pytest

from minimind_jax.data import text_files
from minimind_jax.data.jsonl import expand_paths, iter_records
from minimind_jax.errors import UserError

ROWS = [{"text": "one"}, {"text": "两\u2028行"}, {"text": "three"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(folder, name, data=LINES):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def compress(data):
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


def write_zst(folder):
    half = len(LINES) // 2  # two frames, as parallel compressors write
    return write(folder, "a.jsonl.zst", compress(LINES[:half]) + compress(LINES[half:]))


def write_parquet(folder):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def write_arrow(folder):
    """As `save_to_disk` of the library datasets does, with what it writes beside."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    write(folder / "saved", "state.json", b'{"_data_files": []}')
    write(folder / "saved", "dataset_info.json", b"{}")
    with pyarrow.ipc.new_stream(folder / "saved" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return expand_paths([folder / "saved"])[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda f: write(f, "a.jsonl"),
        lambda f: write(f, "a.jsonl.gz", gzip.compress(LINES)),
        write_zst,
        write_parquet,
        write_arrow,
        lambda f: write(f, "a.jsonl", b"\xef\xbb\xbf" + LINES),
        lambda f: write(f, "a.jsonl", b"".join(b"\xef\xbb\xbf" + line for line in LINES.splitlines(keepends=True))),
        lambda f: write(f, "a.jsonl", LINES.replace(b"\n", b"\r\n").rstrip()),
    ],
    ids=["plain", "gzip", "zstd", "parquet", "arrow", "byte order mark", "in every line", "CRLF, no last newline"],
)
def test_every_format_gives_the_same_records(tmp_path, make):
    file = make(tmp_path)
    records = list(iter_records([file]))
    assert [r.value for r in records] == ROWS
    assert [r.where for r in records] == [f"{file}:{i}" for i in (1, 2, 3)]


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    file = write(tmp_path, "a.jsonl", b'\n{"text": "a"}\n  \n\n{"text": "b"}\n\n')
    assert [(r.line, r.value["text"]) for r in iter_records([str(file)])] == [(2, "a"), (5, "b")]


def test_folders_and_globs(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", "notes.txt"):
        write(tmp_path, name)
    names = lambda paths: [p.name for p in expand_paths(paths)]  # noqa: E731
    assert names([tmp_path]) == ["a.jsonl.gz", "b.jsonl", "c.parquet", "notes.txt"]
    assert names([tmp_path / "*.jsonl*"]) == ["a.jsonl.gz", "b.jsonl"]
    assert names([str(tmp_path / "**" / "*")]) == ["a.jsonl.gz", "b.jsonl", "c.parquet", "notes.txt"]
    assert names([tmp_path / "b.jsonl", tmp_path / "deep"]) == ["b.jsonl", "c.parquet"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    file = write(tmp_path, "part[1].jsonl")
    assert expand_paths([file]) == [file]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON: Expecting ',' delimiter at column"),
        ("a.jsonl", b'{"text": "a"}\n\n[1, 2]\n', r"a\.jsonl:3: a JSON list; expected an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8 text \(byte 10 of the line\)"),
        ("a.jsonl", "{}".encode("utf-16"), r"a\.jsonl:1: not UTF-8 text \(byte 0 of the line\)"),
        ("a.jsonl", "{}".encode("utf-16-le"), r"a\.jsonl:1: not JSON: .*look like UTF-16, save the file as UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON nested too deeply"),
        ("a.jsonl", b'{"text": "a"}\n{"n": NaN}\n', r"a\.jsonl:2: not readable JSON: NaN is no JSON value"),
        ("a.jsonl", b'{"n": -Infinity}\n', r"a\.jsonl:1: not readable JSON: -Infinity is no JSON value"),
        ("a.jsonl", b'{"n": 1e999}\n', r"a\.jsonl:1: not readable JSON: the number 1e999 is too large"),
        ("a.jsonl", b'{"t": [{"text": "a", "text": "b"}]}\n', r"a\.jsonl:1: .*an object has the field 'text' twice"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: the file is empty"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz:1: cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES * 99, mtime=0)[:-20], r"a\.jsonl\.gz:\d+: cannot be read"),
    ],
    ids=[
        "half line",
        "list",
        "latin-1",
        "UTF-16",
        "UTF-16 without mark",
        "deep",
        "NaN",
        "infinity",
        "large number",
        "field twice",
        "empty",
        "blank",
        "not gzip",
        "cut gzip",
    ],
)
def test_broken_files(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        list(iter_records([write(tmp_path, name, data)]))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 21)
    file = write(tmp_path, "a.jsonl", b'{"text": "12345678"}\n{"text": "1234567890"}')
    with pytest.raises(UserError, match=r"a\.jsonl:2: longer than 21 bytes"):
        list(iter_records([file]))


def test_broken_zstd_and_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:1: cannot be read"):
        list(iter_records([write(tmp_path, "a.jsonl.zst", b"no zstd")]))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        list(iter_records([write(tmp_path, "a.parquet", b"no parquet")]))


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_zstd_file_that_was_cut_off_is_no_shorter_file(tmp_path, cut):
    lines = b"".join(b'{"text": "%0100d"}\n' % (i**7) for i in range(5000))
    whole = compress(LINES) + compress(lines)
    assert len(list(iter_records([write(tmp_path, "whole.jsonl.zst", whole)]))) == 5003
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:\d+: cannot be read: Truncated compressed stream"):
        list(iter_records([write(tmp_path, "a.jsonl.zst", whole[:-cut])], on_bad=lambda error: None))


def test_parquet_strings_that_are_no_utf_8(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file: 'utf-8' codec"):
        list(iter_records([tmp_path / "a.parquet"]))


def test_numbers_of_labels_are_called_as_the_data_set_calls_them(tmp_path):
    """As Hugging Face's datasets write a table; the lists of versions before 4, too."""
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    label = {"names": ["负面", "positive"], "_type": "ClassLabel"}
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": label,
        "topics": {"feature": label, "_type": "List"},
        "more": [label],
        "deep": {"n": label},
        "n": {"dtype": "int64", "_type": "Value"},
    }
    rows = [
        {"text": "a", "label": 1, "topics": [0, 1], "more": [], "deep": {"n": 1}, "n": 1},
        {"text": "b", "label": -1, "topics": None, "more": [1], "deep": {"n": 0}, "n": 0},
        {"text": "c", "label": 0, "topics": [-1], "more": [2], "deep": None, "n": None},
    ]
    table = pyarrow.Table.from_pylist(rows)

    def read(metadata):
        parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
        return [record.value for record in iter_records([tmp_path / "a.parquet"])]

    assert read({"huggingface": json.dumps({"info": {"features": features}})}) == [
        {**rows[0], "label": "positive", "topics": ["负面", "positive"]},
        {**rows[1], "label": None, "more": ["positive"]},
        {**rows[2], "label": "负面", "topics": [None], "more": [None]},
    ]
    for other in (b"[]", b'"x"', b"{", b"\xff", b'{"info": {"features": [1]}}', b'{"info": {"features": {"n": {}}}}'):
        assert read({"huggingface": other}) == rows


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "shards/000.tar"])
def test_archives_are_to_be_unpacked(tmp_path, name):
    file = write(tmp_path, name)
    with pytest.raises(UserError, match="unpack archives, and name their folder"):
        expand_paths([file])
    with pytest.raises(UserError, match=r"no data in this folder; .*unpack archives, and name their folder"):
        expand_paths([tmp_path], pictures=True)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)  # what an import of an absent package meets
    with pytest.raises(UserError, match=r"needs pyarrow: \S*python\S* -m pip install .*pyarrow"):
        list(iter_records([write(tmp_path, name)]))


def test_folders_behind_links_are_searched_once_and_hidden_names_are_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("data/a.jsonl", "data/._a.jsonl", "data/.ipynb_checkpoints/a.jsonl", "elsewhere/b.jsonl"):
        write(tmp_path, name)
    (tmp_path / "data" / "far").symlink_to(elsewhere)
    (tmp_path / "data" / "c.jsonl").symlink_to(elsewhere / "b.jsonl")
    (elsewhere / "round").symlink_to(tmp_path / "data")
    found = [str(p.relative_to(tmp_path / "data")) for p in expand_paths([tmp_path / "data"])]
    assert found == ["a.jsonl", "c.jsonl", "far/b.jsonl"]


@pytest.mark.parametrize("given", [".", "*.jsonl"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, given):
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: a link that leads nowhere"):
        expand_paths([tmp_path / given])


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl")
    write(tmp_path, "deep/b.jsonl")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)  # whoever runs the tests may be root, to whom nothing is closed
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied.*deep"):
        expand_paths([tmp_path])


def test_names_that_the_system_refuses(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: .*too long|no such file"):
        expand_paths(["a" * 5000 + ".jsonl"])
    with pytest.raises(UserError, match=r"~nobody-of-this-name/a.jsonl: (cannot be read|no such file)"):
        expand_paths(["~nobody-of-this-name/a.jsonl"])
    with pytest.raises(UserError, match="the name of a data file is empty"):
        expand_paths([""])
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: neither a file nor a folder"):
        expand_paths([tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: no such file .*; check the name"),
        ("sft_t2t_mini.jsonl", r"no such file .*; `minimind data download sft_t2t_mini` fetches it"),
        ("*.jsonl", r"\*\.jsonl: no file matches"),
        ("empty", r"empty: no data in this folder"),
        ("notes.doc", r"notes\.doc: unknown file type; expected a name ending in \.jsonl.*a sheet of Excel as CSV"),
        ("link.txt", r"link\.txt: a link that leads nowhere"),
    ],
)
def test_paths_that_hold_nothing(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(UserError, match=message):
        expand_paths([tmp_path / path])


def test_addresses_are_no_files():
    with pytest.raises(UserError, match=r"s3://bucket/a\.jsonl: data is read from this machine's disks; download it"):
        expand_paths(["s3://bucket/a.jsonl"])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"PK\x03\x04\x14\x00", "a zip archive, as files of Excel"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), r"needs a name that ends in \.gz"),
        ("a.txt", b"\x28\xb5\x2f\xfd", r"needs a name that ends in \.zst"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told_by_what_it_is(tmp_path, name, data, message):
    with pytest.raises(UserError, match=rf"{name}: this is .*{message}"):
        list(iter_records([write(tmp_path, name, data)]))


def test_broken_lines_can_be_skipped_and_seen(tmp_path):
    errors = []
    file = write(tmp_path, "a.jsonl", b'{"text": "a"}\nnope\n{"text": "b"}\n')
    assert [r.value["text"] for r in iter_records([file], errors.append)] == ["a", "b"]
    assert len(errors) == 1 and "a.jsonl:2" in str(errors[0])


def test_a_number_of_too_many_digits_is_a_broken_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: not readable JSON: .*digits"):
        list(iter_records([file]))
