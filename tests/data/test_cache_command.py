"""`minimind data cache`: what it lists, what it removes, and what it must not."""

import contextlib
import gc
import io
import json
import os
import time

import filelock
import pytest

from minimind_jax.config.sections import DataConfig
from minimind_jax.config.tools import CacheConfig
from minimind_jax.data import cache_folder
from minimind_jax.data.cache_folder import cache_root, lock_file, run, stored_caches
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["The cat sleeps."], tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), tokenizer_workers=1)


def write(path, count=3):
    path.write_text("".join(json.dumps({"text": f"The cat sleeps {i} hours."}) + "\n" for i in range(count)))
    return path


def build(file, tokenizer, data):
    """The folder of a cache that nothing holds open any more."""
    folder = build_cache("text", [file], tokenizer, data, seed=1).folder
    gc.collect()
    return folder


def shown(data, **options):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        left = run(CacheConfig(cache_dir=data.cache_dir, **options))
    return {cache.folder for cache in left}, out.getvalue()


def used_days_ago(folder, days):
    os.utime(folder / "info.json", (time.time() - days * 86_400 - 60,) * 2)


def test_caches_are_listed_with_size_age_and_files(tmp_path, tokenizer, data):
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    folder = build(first, tokenizer, data)
    used_days_ago(folder, 3)
    cache = build_cache("text", [first, second], tokenizer, data, seed=1)
    folders, text = shown(data)
    assert folders == {folder, cache.folder}
    lines = text.splitlines()
    sizes = {f: sum(file.stat().st_size for file in f.iterdir()) for f in folders}
    assert lines[0] == f"{cache_root(data)}: 2 caches, {sum(sizes.values()) / 1000:.1f} kB"
    assert lines[1].split("  ")[0] == cache.folder.name[:8] and lines[1].endswith("used today  in use")
    assert lines[2].strip() == f"{first}, {second}"
    assert lines[3].split()[:2] == [folder.name[:8], "text"] and lines[3].endswith("used 3 days ago")
    assert shown(data, days=2)[0] == {folder}


def test_opening_a_cache_is_using_it(tmp_path, tokenizer, data):
    folder = build(write(tmp_path / "a.jsonl"), tokenizer, data)
    used_days_ago(folder, 30)
    build(tmp_path / "a.jsonl", tokenizer, data)
    assert time.time() - stored_caches(cache_root(data))[0].last_used < 1000


def test_a_cache_that_is_open_or_being_made_is_never_removed(tmp_path, tokenizer, data):
    cache = build_cache("text", [write(tmp_path / "a.jsonl")], tokenizer, data, seed=1)
    making = build(write(tmp_path / "b.jsonl"), tokenizer, data)
    with filelock.FileLock(lock_file(making)):
        left, text = shown(data, clear="all")
    assert left == {cache.folder, making}
    assert "removed 0 caches" in text and "kept 2 caches" in text
    folder = cache.folder
    del cache
    gc.collect()
    left, text = shown(data, clear="all")
    assert not left and "removed 2 caches" in text and "kept" not in text
    assert build(tmp_path / "a.jsonl", tokenizer, data) == folder


def test_clearing_by_days_keeps_what_was_used_since(tmp_path, tokenizer, data):
    old, new = (build(write(tmp_path / name), tokenizer, data) for name in ("a.jsonl", "b.jsonl"))
    used_days_ago(old, 10)
    assert shown(data, clear="all", days=7)[0] == {new}


def test_only_caches_that_no_run_can_use_are_stale(tmp_path, tokenizer, data, monkeypatch, capsys):
    kept, changed, gone = (build(write(tmp_path / name), tokenizer, data) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    left_over = cache_root(data) / f".{'0' * 32}.1.tmp"
    left_over.mkdir()
    (left_over / "tokens.bin").write_bytes(b"123")
    capsys.readouterr()
    write(tmp_path / "b.jsonl", 5)
    (tmp_path / "c.jsonl").unlink()
    again = build(tmp_path / "b.jsonl", tokenizer, data)
    hint = " ".join(capsys.readouterr().err.split())
    assert "1 older cache of these files" in hint and "minimind data cache --clear stale --cache_dir" in hint
    assert {c.folder for c in stored_caches(cache_root(data)) if c.stale} == {changed, gone, left_over}
    assert shown(data, clear="stale")[0] == {kept, again}
    monkeypatch.setattr(cache_folder, "FORMAT_VERSION", 99)
    assert all(cache.stale for cache in stored_caches(cache_root(data)))


def test_damaged_caches_are_listed_and_what_is_no_cache_is_left_alone(tmp_path, tokenizer, data):
    folder = build(write(tmp_path / "a.jsonl"), tokenizer, data)
    (folder / "info.json").write_text("{")
    other = cache_root(data) / "mine"
    other.mkdir()
    assert f"{folder.name[:8]}  damaged" in shown(data)[1]
    assert not shown(data, clear="stale")[0]
    assert other.is_dir() and not folder.exists()


def test_an_empty_place_is_no_error(data):
    assert "0 caches" in shown(data)[1]
    assert "removed 0 caches" in shown(data, clear="all")[1]


def test_a_folder_that_cannot_be_removed_is_named(tmp_path, tokenizer, data, monkeypatch):
    folder = build(write(tmp_path / "a.jsonl"), tokenizer, data)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_folder.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=f"{folder.name}: cannot be removed: .*Permission denied"):
        shown(data, clear="all")
