"""The token cache: what is in it, when it is rebuilt, and that no error or kill leaves half of one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minimind_jax.config.sections import DataConfig
from minimind_jax.data import cache_folder, template
from minimind_jax.data.cache_folder import cache_root
from minimind_jax.data.documents import encode_conversation, encode_text
from minimind_jax.data.jsonl import iter_records
from minimind_jax.data.kinds import parse_conversation
from minimind_jax.data.template import Dice
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError

TEXTS = [f"The {animal} number {i} eats 麦子 and sleeps." for i in range(40) for animal in ("cat", "dog", "ox")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_bpe(TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), tokenizer_workers=1)


def write_lines(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def texts(count=30):
    return [{"text": text} for text in TEXTS[:count]]


def conversations(count=30):
    return [
        {
            "conversations": [
                {"role": "user", "content": f"What does animal {i} eat?"},
                {"role": "assistant", "content": f"Animal {i} eats 麦子."},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": "It sleeps."},
            ]
        }
        for i in range(count)
    ]


def documents(cache):
    return [cache.ids(d, 0, int(n)).tolist() for d, n in enumerate(cache.lengths)]


def test_text_documents_are_those_of_encode_text(tmp_path, tokenizer, data):
    cache = build_cache("text", [write_lines(tmp_path / "a.jsonl", texts())], tokenizer, data, seed=1)
    expected = [encode_text(tokenizer, record["text"]) for record in texts()]
    assert documents(cache) == [document.ids.tolist() for document in expected]
    assert cache.tokens.dtype == np.uint16
    assert cache.info["trained_tokens"] == sum(len(d.ids) - 1 for d in expected)


@pytest.mark.parametrize("epoch", [0, 3])
def test_conversations_are_those_of_encode_conversation_with_the_dice_of_their_number(tmp_path, tokenizer, data, epoch):
    file = write_lines(tmp_path / "a.jsonl", conversations())
    data = dataclasses.replace(data, system_prompt_probability=0.5, empty_think_removal=0.5, redraw_each_epoch=True)
    cache = build_cache("conversation", [file], tokenizer, data, seed=5, epoch=epoch)
    for number, record in enumerate(iter_records([file])):
        expected = encode_conversation(tokenizer, parse_conversation(record), Dice(5, epoch, 0.5, 0.5).roll(number))
        length = int(cache.lengths[number])
        assert cache.ids(number, 0, length).tolist() == expected.ids.tolist()
        assert cache.is_trained(number, 0, length).tolist() == expected.trained.tolist()
        assert cache.turns(number).tolist() == expected.turn_starts
    assert len({int(n) for n in cache.lengths}) > 1  # the dice did something


def test_the_number_of_processes_does_not_change_the_files(tmp_path, tokenizer, data, monkeypatch):
    monkeypatch.setattr("minimind_jax.data.tokenise.CHUNK_BYTES", 600)
    paths = [write_lines(tmp_path / f"{i}.jsonl", conversations(10 + i)) for i in range(3)]
    folders = []
    for workers in (1, 3):
        settings = dataclasses.replace(data, cache_dir=str(tmp_path / f"cache{workers}"), tokenizer_workers=workers)
        folders.append(build_cache("conversation", paths, tokenizer, settings, seed=1).folder)
    names = sorted(path.name for path in folders[0].glob("*.bin"))
    assert len(names) == 7
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_tokenising_processes_do_without_jax():
    code = "import sys, minimind_jax.data.tokenise; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_second_call_maps_the_same_files(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts())
    first = build_cache("text", [file], tokenizer, data, seed=1)
    made = (first.folder / "tokens.bin").stat().st_mtime_ns
    again = build_cache("text", [file], tokenizer, data, seed=2)  # nothing is drawn for text: any seed will do
    assert again.folder == first.folder
    assert (again.folder / "tokens.bin").stat().st_mtime_ns == made


def test_a_changed_file_is_tokenised_again(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(10))
    first = build_cache("text", [file], tokenizer, data, seed=1)
    same_size = file.read_text(encoding="utf-8").replace("cat", "cow")
    file.write_text(same_size, encoding="utf-8")
    os.utime(file, ns=(1, 1))
    second = build_cache("text", [file], tokenizer, data, seed=1)
    assert documents(first) != documents(second)
    assert documents(second)[0] == encode_text(tokenizer, TEXTS[0].replace("cat", "cow")).ids.tolist()


def test_another_tokenizer_or_setting_makes_another_cache(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", conversations(5))

    def folder(tokenizer=tokenizer, seed=1, epoch=0, **changes):
        return build_cache(
            "conversation", [file], tokenizer, dataclasses.replace(data, **changes), seed, epoch
        ).folder.name

    other_tokenizer = train_bpe(TEXTS, tmp_path / "other", vocab_size=330)
    folders = [
        folder(),
        folder(tokenizer=other_tokenizer),
        folder(seed=2),
        folder(system_prompt_probability=0.3),
        folder(empty_think_removal=0.3),
        folder(redraw_each_epoch=True, epoch=1),
        folder(redraw_each_epoch=True, epoch=2),
    ]
    assert len(set(folders)) == len(folders)
    assert folder(epoch=4) == folders[0]  # without redraw_each_epoch one cache serves all epochs
    assert folder(seq_len=16, val_fraction=0.5, loader_workers=3, on_error="skip") == folders[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EMPTY_THINK", "<think></think>"),
        ("OPENED_THINK", "<think> "),
        ("_MARKED", template._MARKED.replace("# Tools", "Tools")),
        ("SYSTEM_PROMPTS", (*template.SYSTEM_PROMPTS[:-1], "Talk.")),
        ("SYSTEM_PROMPTS", template.SYSTEM_PROMPTS[::-1]),
        ("named_seed", lambda seed, name, record, epoch: record),
    ],
)
def test_an_edit_of_what_renders_conversations_makes_another_cache(tmp_path, tokenizer, data, monkeypatch, name, value):
    file = write_lines(tmp_path / "a.jsonl", conversations(3))
    words = write_lines(tmp_path / "b.jsonl", texts(3))
    conversation, text = (
        build_cache(kind, [path], tokenizer, data, seed=1).folder
        for kind, path in (("conversation", file), ("text", words))
    )
    monkeypatch.setattr(template, name, value)
    assert build_cache("conversation", [file], tokenizer, data, seed=1).folder != conversation
    assert build_cache("text", [words], tokenizer, data, seed=1).folder == text


def test_a_long_text_is_kept_whole(tmp_path, tokenizer, data):
    text = "The ox sleeps. " * 5000
    cache = build_cache("text", [write_lines(tmp_path / "a.jsonl", [{"text": text}])], tokenizer, data, seed=1)
    assert tokenizer.decode(documents(cache)[0]) == text


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("text", '{"text": "a"', "not JSON"),
        ("text", '{"words": "a"}', "missing field `text`"),
        ("conversation", '{"conversations": [{"role": "boss", "content": "a"}]}', "unknown role 'boss'"),
        ("conversation", '{"conversations": [{"role": "user", "content": "a"}]}', "nothing to train on"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path, tokenizer, data, workers, kind, bad, message):
    good = texts(4) if kind == "text" else conversations(4)
    file = write_lines(tmp_path / "a.jsonl", good)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(bad + "\n")
    data = dataclasses.replace(data, tokenizer_workers=workers)
    with pytest.raises(UserError) as caught:
        build_cache(kind, [file], tokenizer, data, seed=1)
    assert f"{file}:5: " in str(caught.value)
    assert message in str(caught.value)
    assert not [path for path in cache_root(data).iterdir() if path.is_dir()]


def test_skipping_counts_and_reports_and_keeps_the_numbers_of_the_others(tmp_path, tokenizer, data, capsys):
    lines = [json.dumps(record) for record in texts(6)]
    lines[1], lines[4] = "no JSON", '{"text": 7}'
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    data = dataclasses.replace(data, on_error="skip")
    for _ in range(2):  # a cache that is only opened reports, too
        cache = build_cache("text", [file], tokenizer, data, seed=1)
        assert cache.info["skipped"] == 2 and len(cache) == 4
        assert cache.records.tolist() == [0, 2, 3, 5]
        assert "a.jsonl:2" in cache.info["skipped_messages"][0] and "a.jsonl:5" in cache.info["skipped_messages"][1]
        report = "".join(capsys.readouterr().err.split())
        assert "Skipped2of6records" in report and "a.jsonl:2" in report
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):  # the same cache, and now this is an error
        build_cache("text", [file], tokenizer, dataclasses.replace(data, on_error="stop"), seed=1)


@pytest.mark.parametrize(
    ("content", "message"), [("", "the file is empty"), ("no JSON\n{}\n", "no usable record, 2 were skipped")]
)
def test_files_without_records_are_errors_even_when_skipping(tmp_path, tokenizer, data, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        build_cache("text", [file], tokenizer, dataclasses.replace(data, on_error="skip"), seed=1)


def test_no_training_files_is_an_error_that_names_the_setting(tokenizer, data):
    with pytest.raises(UserError, match=r"data\.train is empty"):
        build_cache("text", [], tokenizer, data, seed=1)


def test_a_cache_folder_that_cannot_be_written_is_explained(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(3))
    with pytest.raises(UserError, match=r"data\.cache_dir \(or MINIMIND_CACHE\)"):
        build_cache("text", [file], tokenizer, dataclasses.replace(data, cache_dir=str(file / "cache")), seed=1)


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, tokenizer, data, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    file = write_lines(tmp_path / "a.jsonl", texts(3))

    def full(path, *args, **kwargs):
        return open("/dev/full" if str(path).endswith("tokens.bin") else path, *args, **kwargs)

    monkeypatch.setattr("minimind_jax.data.token_cache.open", full, raising=False)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        build_cache("text", [file], tokenizer, data, seed=1)
    assert not [path for path in cache_root(data).iterdir() if path.is_dir()]


BUILD = """
import sys
import minimind_jax.data.tokenise as tokenise
from minimind_jax.config.sections import DataConfig
from minimind_jax.data import cache_folder
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import Tokenizer

if __name__ == "__main__":
    tokenise.CHUNK_BYTES = 2000
    file, folder, cache_dir, workers = sys.argv[1:]
    data = DataConfig(cache_dir=cache_dir, tokenizer_workers=int(workers))
    cache = build_cache("text", [file], Tokenizer.load(folder), data, seed=1)
    print(len(cache), cache.tokens.sum())
"""


def start_build(tmp_path, *arguments, code=BUILD) -> subprocess.Popen:
    script = tmp_path / "build.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the processes in /proc")
def test_a_killed_build_leaves_no_cache_and_no_processes_and_the_next_one_succeeds(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(120) * 75)
    build = start_build(tmp_path, file, tokenizer.folder, data.cache_dir, 2)
    while not any(part.stat().st_size for part in cache_root(data).glob(".*.tmp/tokens.bin")):
        assert build.poll() is None, "the build ended before it could be killed"
        time.sleep(0.02)
    workers = children_of(build.pid)
    assert len(workers) >= 2
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert not list(cache_root(data).glob("[!.]*/info.json"))
    assert list(cache_root(data).glob(".*.tmp"))
    cache = build_cache("text", [file], tokenizer, data, seed=1)
    assert len(cache) == 9_000
    assert not list(cache_root(data).glob(".*.tmp"))
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "tokenising processes outlive the killed run"
        time.sleep(0.1)


def test_a_script_without_a_main_guard_runs_once(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(120))
    code = BUILD.replace('if __name__ == "__main__":', "if True:")
    build = start_build(tmp_path, file, tokenizer.folder, data.cache_dir, 2, code=code)
    output, _ = build.communicate()
    assert build.returncode == 0 and output.startswith("120 ") and output.count("\n") == 1


def test_processes_and_threads_that_race_for_a_cache_share_one(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(120) * 20)
    builds = [start_build(tmp_path, file, tokenizer.folder, data.cache_dir, 1) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: build_cache("text", [file], tokenizer, data, seed=1), range(3)))
    outputs = {build.communicate()[0] for build in builds}
    assert outputs == {f"2400 {caches[0].tokens.sum()}\n"}
    assert len({cache.folder for cache in caches}) == 1
    assert len([path for path in cache_root(data).iterdir() if path.is_dir()]) == 1


def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer, data):
    file = write_lines(tmp_path / "a.jsonl", texts(5))
    folder = build_cache("text", [file], tokenizer, data, seed=1).folder
    with (folder / "tokens.bin").open("r+b") as stream:
        stream.truncate(10)
    cache = build_cache("text", [file], tokenizer, data, seed=1)
    assert documents(cache)[4] == encode_text(tokenizer, TEXTS[4]).ids.tolist()


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer, data, monkeypatch):
    monkeypatch.setattr("minimind_jax.data.tokenise.CHUNK_BYTES", 50_000)
    peaks, sizes = [], []
    for count in (100, 500):
        file = write_lines(tmp_path / f"{count}.jsonl", [{"text": "The cat sleeps. " * 400}] * count)
        tracemalloc.start()
        build_cache("text", [file], tokenizer, data, seed=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(file.stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 20, f"files of {sizes} bytes took {peaks} bytes of memory"


def test_a_file_with_another_content_and_the_same_size_and_times_is_noticed(tmp_path, tokenizer, data, monkeypatch):
    """As `cp -p`, rsync -t and backups leave it; after a while, when its hash is remembered."""
    monkeypatch.setattr(cache_folder, "SETTLED_SECONDS", -1.0)
    file = write_lines(tmp_path / "a.jsonl", texts(10))
    before = build_cache("text", [file], tokenizer, data, seed=1)
    stat = file.stat()
    file.write_text(file.read_text("utf-8").replace("cat", "cow"), "utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = build_cache("text", [file], tokenizer, data, seed=1)
    assert documents(after) != documents(before) and after.content != before.content
    # Touched, and moved: the same data.
    os.utime(file)
    assert build_cache("text", [file], tokenizer, data, seed=1).folder == after.folder
    moved = build_cache("text", [file.rename(tmp_path / "b.jsonl")], tokenizer, data, seed=1)
    assert (moved.content, moved.made_of) == (after.content, after.made_of)


def test_a_hash_is_made_once(tmp_path, tokenizer, data, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", texts(10))
    monkeypatch.setattr(cache_folder, "SETTLED_SECONDS", -1.0)
    found = cache_folder.file_identities([file], tmp_path)
    monkeypatch.setattr(cache_folder, "_hash", lambda path: pytest.fail("read again"))
    assert cache_folder.file_identities([file], tmp_path) == found
    (tmp_path / cache_folder.REMEMBERED).write_text("[1")  # damaged: read again
    with pytest.raises(pytest.fail.Exception, match="read again"):
        cache_folder.file_identities([file], tmp_path)
