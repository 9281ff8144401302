"""Models that are not trained: the policy as it was at the start, and what a frozen model says of a run's data, asked
once before the first step and kept in the run's folder."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from minimind_jax.agreement import ending_alone, first_says, on_first
from minimind_jax.data.batches import Batches
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.errors import UserError
from minimind_jax.model.lora import TRAINED, join, split, without_adapters
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.paths import is_remote
from minimind_jax.progress import tracked
from minimind_jax.runs.parts import Run, open_rows
from minimind_jax.sharding import announce, shard_batch
from minimind_jax.texts import is_there, read_object
from minimind_jax.training.run import write_text
from minimind_jax.training.state import Parameters, fingerprint

REFERENCE = "reference"  # the key of what only the reference has, among the parameters

# Asked at every step --------------------------------------------------------------------------------------------------


class Reference:
    """The policy as it was at the start: a function of all parameters that gives its model and its parameters.

    has_own: whether there are parameters of its own among them, under REFERENCE: a copy of all, or of adapters that
    were trained before. If not, it is the model without its adapters.
    """

    def __init__(self, model: LanguageModel, has_own: bool):
        self.model, self.has_own = model, has_own
        self.base = LanguageModel(model.config, model.compute)

    @classmethod
    def of(cls, run: Run) -> "Reference":
        """That of a run's model: new adapters change nothing at the start."""
        return cls(run.model, has_own=run.adapters is None or run.adapters.stored is not None)

    def __call__(self, params: Params) -> tuple[LanguageModel, Params]:
        shared = {name: tree for name, tree in params.items() if name != REFERENCE}
        if not self.has_own:
            return self.base, without_adapters(shared)
        if self.model.adapter is None:
            return self.model, params[REFERENCE]
        return self.model, join(split(shared, lambda path: path[-1] not in TRAINED)[0], params[REFERENCE])

    def add_to(self, parameters: Parameters) -> Parameters:
        """The parameters with those of the reference, which are never trained."""
        if not self.has_own:
            return parameters

        def trained(tree: Params) -> Params:
            return parameters.split(tree)[0]

        def copy(params: Params) -> Params:
            return jax.tree.map(lambda leaf: leaf.copy(), trained(params))

        return parameters.adding(REFERENCE, trained(parameters.abstract), trained(parameters.axes), copy)


# Asked once -----------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What a frozen model speaks of: every token, or every pair. It has a row in the table of its cache.

    offsets: of a cache, the row of each document's first one, and their number, (documents + 1,). where: `documents`
    and `places` of those in rows of data, int32, places from 0 in each document; -1 for none. rows: what the table
    says, put where the loss reads it.
    """

    offsets: Callable[[TokenCache], np.ndarray]
    where: Callable[[Pieces], Batch]
    rows: Callable[[np.ndarray, TokenCache, Pieces], np.ndarray]


def _places_of_tokens(pieces: Pieces) -> Batch:
    documents, starts = pieces.each(pieces.documents, -1), pieces.each(pieces.starts, -1)
    return {"documents": documents.astype(np.int32), "places": (starts + pieces.positions).astype(np.int32)}


def _said_of_tokens(table: np.ndarray, cache: TokenCache, pieces: Pieces) -> np.ndarray:
    found = table[pieces.sources(cache)]
    found[pieces.is_padding] = 0
    return found


# What is said of a token is behind the tokens before it in its row's piece: pieces must be the same in every epoch.
TOKENS = Unit(lambda cache: cache.offsets, _places_of_tokens, _said_of_tokens)


def pairs(room: int) -> Unit:
    """A pair of documents, whose sides are neighbouring pieces; two numbers each. room: pieces that a row may have."""

    def where(pieces: Pieces) -> Batch:
        documents = np.full((pieces.row_count, room // 2), -1, np.int32)
        documents[pieces.rows, pieces.segments // 2] = pieces.documents
        return {"documents": documents, "places": np.zeros_like(documents)}

    def rows(table: np.ndarray, _: TokenCache, pieces: Pieces) -> np.ndarray:
        found = np.zeros((pieces.row_count, room), table.dtype)
        found[pieces.rows, pieces.segments] = table[pieces.documents, pieces.segments % 2]
        return found

    return Unit(lambda cache: np.arange(len(cache) + 1), where, rows)


class Asked(NamedTuple):
    """A question to a frozen model. name: whose folder below the run's it is. setting: by which it is changed.

    columns: of what is kept, by its name in a batch, the ending of its file and the dtype there; `width` numbers for
    each unit. ask: of parameters and a batch, an array (rows, units of a row, width) for each column. made_of: what
    else decides the answers. what: it is asked for, in words; way_out: of a full disk.
    """

    name: str
    setting: str
    unit: Unit
    columns: dict[str, tuple[str, type]]
    width: int
    ask: Callable[[Params, dict[str, Array]], tuple[Array, ...]]
    made_of: dict[str, Any]
    what: str
    way_out: str = ""


class Answers:
    """What a frozen model says of the data of a run; of an earlier start, unless something in it has changed.

    `annotate` puts it into rows, as the columns say. params: the model's, on the mesh.
    Raises UserError when the model is another than the run was started with, or the answers cannot be written.
    """

    def __init__(self, run: Run, asked: Asked, params: Params):
        self.run, self.asked = run, asked
        self.folder = run.folder.path / asked.name
        sides = [side for side in open_rows(run, lambda _, pieces: asked.unit.where(pieces)) if side is not None]
        caches = {side.cache.folder.name: side.cache for side in sides}
        made_of = {asked.name: fingerprint(params), **asked.made_of, "caches": sorted(caches)}
        record = self.folder / "made_of.json"
        earlier = read_object(record, "remove it, to ask again") if is_there(record) else None
        if earlier and earlier[asked.name] != made_of[asked.name] and run.folder.checkpoint_steps():
            raise UserError(
                f"{asked.setting} (or compute.dtype) has changed since {run.folder.path} was started; restore it, or "
                "start another run"
            )
        counts = {name: int(asked.unit.offsets(cache)[-1]) for name, cache in caches.items()}
        if first_says(earlier != made_of or not self._are_whole(counts)):
            self._make(sides, counts, params)
            on_first(lambda: write_text(record, json.dumps(made_of)))
        self.tables = {name: [self._read(*file) for file in self._files(name)] for name in caches}

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        found = {}
        for name, table in zip(self.asked.columns, self.tables[cache.folder.name], strict=True):
            dtype = np.int32 if table.dtype.kind == "u" else table.dtype
            found[name] = self.asked.unit.rows(table, cache, pieces).astype(dtype, copy=False)
        return found

    def _make(self, sides: list[Batches], counts: dict[str, int], params: Params) -> None:
        """Asks for all rows; the first process writes."""
        size = sum(self._size(count, dtype) for count in counts.values() for _, dtype in self.asked.columns.values())
        announce(f"asking the {self.asked.name} once for {self.asked.what} ({size / 2**20:,.1f} MiB)")
        tables: dict[str, list[np.ndarray]] = {}

        def make_room() -> None:
            with self._told_when_full(size):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "made_of.json").unlink(missing_ok=True)
                for name, count in counts.items():
                    tables[name] = [self._new(*file, count) for file in self._files(name)]

        def close() -> None:
            with self._told_when_full(size):
                for name, filled in tables.items():
                    for (file, _), table in zip(self._files(name), filled, strict=True):
                        file.write_bytes(table.tobytes()) if is_remote(file) else table.flush()

        on_first(make_room)
        with ending_alone():
            for side in sides:
                self._fill(tables.get(side.cache.folder.name), side, params)
        on_first(close)

    def _fill(self, tables: list[np.ndarray] | None, batches: Batches, params: Params) -> None:
        offsets, mesh, is_first = self.asked.unit.offsets(batches.cache), self.run.mesh, jax.process_index() == 0
        ask = jax.jit(self.asked.ask)
        for batch in tracked(batches.eval_batches(), f"the {self.asked.name}", batches.eval_steps(), show=is_first):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                placed = shard_batch(batch, mesh)
                found = (placed.pop("documents"), placed.pop("places"), *ask(params, placed))
            if jax.process_count() > 1:
                found = multihost_utils.process_allgather(found, tiled=True)
            if tables is not None:
                documents, places, *values = (np.asarray(array) for array in found)
                is_unit = documents >= 0
                rows = offsets[documents[is_unit]] + places[is_unit]
                for table, value in zip(tables, values, strict=True):
                    table[rows] = value[is_unit]

    # The tables on the disk ---------------------------------------------------------------------------------------

    def _files(self, cache: str) -> list[tuple[Path, type]]:
        return [(self.folder / f"{cache}.{ending}", dtype) for ending, dtype in self.asked.columns.values()]

    def _size(self, count: int, dtype: type) -> int:
        return count * self.asked.width * np.dtype(dtype).itemsize

    def _are_whole(self, counts: dict[str, int]) -> bool:
        files = [(*file, count) for name, count in counts.items() for file in self._files(name)]
        return all(  # objects appear whole
            is_remote(file) or (file.is_file() and file.stat().st_size == self._size(count, dtype))
            for file, dtype, count in files
        )

    def _new(self, file: Path, dtype: type, count: int) -> np.ndarray:
        """An empty table; on a disk with its room there, so that a full one is told now. Raises OSError."""
        if is_remote(file):
            return np.zeros((count, self.asked.width), dtype)
        with file.open("wb") as stream:
            rest = self._size(count, dtype)
            while rest:
                rest -= stream.write(bytes(min(rest, 2**24)))
        return np.memmap(file, dtype, "r+").reshape(-1, self.asked.width)

    def _read(self, file: Path, dtype: type) -> np.ndarray:
        found = np.frombuffer(file.read_bytes(), dtype) if is_remote(file) else np.memmap(file, dtype, "r")
        return found.reshape(-1, self.asked.width)

    @contextlib.contextmanager
    def _told_when_full(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write {size / 2**20:,.1f} MiB: {error.strerror or error}; make room"
                f"{self.asked.way_out}, and run again"
            ) from error
