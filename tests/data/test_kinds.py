"""A new kind of data is a row of the table: nothing else knows the kinds by name."""

import json

import numpy as np
import pytest
from rich.console import Console

from minimind_jax.config.sections import DataConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.cache_folder import stored_caches
from minimind_jax.data.documents import Document
from minimind_jax.data.epoch import describe_cuts
from minimind_jax.data.inspect import inspect
from minimind_jax.data.kinds import KINDS, Kind
from minimind_jax.data.token_cache import build_cache
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.errors import UserError

SUM = Kind(
    noun="sums",
    parse=lambda record, wanted: (record.value["left"], record.value["right"]),
    as_record=lambda parsed: dict(zip(("left", "right"), parsed, strict=True)),
    encode=lambda tokenizer, parsed, roll, tell: written(tokenizer, *parsed),
    packings=("best_fit",),
    why_no_row="no sum fits a row",
    has_values=True,
    cut_freely=True,
)


def written(tokenizer, left, right):
    ids = np.array(tokenizer.encode(f"{left}+{right}={left + right}"), np.int32)
    return Document(ids, np.ones(len(ids), bool), [0], (float(left + right),))


def test_a_kind_of_ones_own_is_tokenised_packed_inspected_and_told(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "sum", SUM)
    tokenizer = train_bpe(["0123456789+="], tmp_path / "tokenizer", 300)
    file = tmp_path / "sums.jsonl"
    sums = [(10**n, 7) for n in range(12)]
    file.write_text("".join(json.dumps(SUM.as_record(parsed)) + "\n" for parsed in sums))
    data = DataConfig(train=(str(file),), seq_len=16, cache_dir=str(tmp_path / "cache"), tokenizer_workers=1)
    cache = build_cache("sum", data.train, tokenizer, data, seed=0)
    np.testing.assert_array_equal(cache.values[:, 0], np.float32([left + right for left, right in sums]))
    batches = Batches(cache, data, 2, 0, tokenizer.token_bytes())
    assert batches.epoch(0).packing == "best_fit"
    rows = list(batches.iterate(0, batches.steps_per_epoch))
    assert sum(batch["loss_weights"].sum() for batch in rows) == cache.info["tokens"] - len(cache)
    told = describe_cuts(batches.epoch(0))
    assert "of 12 sums are longer than data.seq_len 16" in told
    (stored,) = stored_caches(tmp_path / "cache" / "tokens")
    assert stored.kind == "sum" and not stored.stale
    console = Console(record=True, width=100)
    assert list(inspect([file], tokenizer, data, "sum", console=console).packings) == ["best_fit"]
    assert "packing 12 sums into rows of 16 tokens" in console.export_text()
    with pytest.raises(UserError, match="no document is left"):
        Batches(cache, data, 2, 0, tokenizer.token_bytes(), select=lambda cache: np.zeros(0, int))
