"""Models that are not trained: the policy as it was at the start, and what a frozen model says of a run's data, asked
once before the first step and kept in the run's folder."""

import json
import math
from collections.abc import Callable
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
from minimind_jax.errors import UserError, disk_errors
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
    were trained before. If not, it is the model without its adapters, for new ones change nothing at the start.
    """

    def __init__(self, model: LanguageModel, has_own: bool):
        self.model, self.has_own = model, has_own
        self.base = LanguageModel(model.config, model.compute)

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

        def copy(params: Params) -> Params:
            return jax.tree.map(lambda leaf: leaf.copy(), parameters.split(params)[0])

        abstract, axes = (parameters.split(tree)[0] for tree in (parameters.abstract, parameters.axes))
        return parameters.adding(REFERENCE, abstract, axes, copy)


# Asked once -----------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """What a frozen model speaks of: every token, or every pair. Each has a row in the tables of its cache."""

    count: Callable[[TokenCache], int]  # how many a cache has
    rows: Callable[[TokenCache, Pieces], np.ndarray]  # of the units in rows of data, (rows, units), -1 for none


# What is said of a token is behind the tokens before it in its row's piece: pieces must be the same in every epoch.
TOKENS = Unit(
    lambda cache: int(cache.offsets[-1]), lambda cache, pieces: np.where(pieces.is_padding, -1, pieces.sources(cache))
)


def pairs(room: int) -> Unit:
    """A pair of documents, whose sides are neighbouring pieces. room: pieces that a row may have."""

    def rows(_: TokenCache, pieces: Pieces) -> np.ndarray:
        found = np.full((pieces.row_count, room // 2), -1)
        found[pieces.rows, pieces.segments // 2] = pieces.documents
        return found

    return Unit(len, rows)


class Asked(NamedTuple):
    """A question to a frozen model."""

    name: str  # whose folder below the run's it is
    setting: str  # by which it is changed
    unit: Unit
    # of what is kept, by its name in a batch, the ending of its file and the dtype there
    columns: dict[str, tuple[str, type]]
    width: int
    # of parameters and a batch, an array (rows, units, width) for each column
    ask: Callable[[Params, dict[str, Array]], tuple[Array, ...]]
    made_of: dict[str, Any]  # what else decides the answers
    what: str  # it is asked for, in words
    way_out: str = ""  # of a full disk


class Answers:
    """What a frozen model says of the data of a run; of an earlier start, unless something in it has changed.

    `annotate` puts it into rows, as the columns say. params: the model's, on the mesh.
    Raises UserError when the model is another than the run was started with, or the answers cannot be written.
    """

    def __init__(self, run: Run, asked: Asked, params: Params):
        self.mesh, self.asked = run.mesh, asked
        self.record = run.folder.path / asked.name / "made_of.json"
        sides = [side for side in open_rows(run, self._places) if side is not None]
        caches = {side.cache.folder.name: side.cache for side in sides}
        self.files: dict[tuple[str, str], _Table] = {}  # by cache and column
        for name, cache in caches.items():
            shape = (asked.unit.count(cache), asked.width)
            for column, (ending, dtype) in asked.columns.items():
                self.files[name, column] = _Table(self.record.with_name(f"{name}.{ending}"), dtype, shape)
        made_of = {asked.name: fingerprint(params), **asked.made_of, "caches": sorted(caches)}
        earlier = read_object(self.record, "remove it, to ask again") if is_there(self.record) else None
        if earlier and earlier[asked.name] != made_of[asked.name] and run.folder.checkpoint_steps():
            raise UserError(
                f"{asked.setting} (or compute.dtype) has changed since {run.folder.path} was started; restore it, or "
                "start another run"
            )
        if first_says(earlier != made_of or not all(file.is_whole() for file in self.files.values())):
            self._make(sides, params)
            on_first(lambda: write_text(self.record, json.dumps(made_of)))
        self.tables = {key: file.read() for key, file in self.files.items()}

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        """What is said of the units in rows, (rows, units, width), 0 where there is none."""
        rows, found = self.asked.unit.rows(cache, pieces), {}
        for column in self.asked.columns:
            said = self.tables[cache.folder.name, column][rows]
            said[rows < 0] = 0
            found[column] = said.astype(np.int32 if said.dtype.kind == "u" else said.dtype, copy=False)
        return found

    def _places(self, cache: TokenCache, pieces: Pieces) -> Batch:
        """Where the answers go, as devices hold it: rows of a table in two halves of 31 bits, (rows, units, 2)."""
        rows = self.asked.unit.rows(cache, pieces)
        return {"places": np.stack([rows >> 31, rows & 0x7FFFFFFF], axis=-1).astype(np.int32)}

    def _make(self, sides: list[Batches], params: Params) -> None:
        """Asks for all rows; the first process writes."""
        size = sum(file.size for file in self.files.values()) / 2**20
        announce(f"asking the {self.asked.name} once for {self.asked.what} ({size:,.1f} MiB)")
        tables: dict[tuple[str, str], np.ndarray] = {}
        what = f"{self.record.parent}: cannot write {size:,.1f} MiB"
        way_out = f"make room{self.asked.way_out}, and run again"

        @disk_errors(what, way_out)
        def make_room() -> None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            self.record.unlink(missing_ok=True)
            tables.update({key: file.create() for key, file in self.files.items()})

        @disk_errors(what, way_out)
        def close() -> None:
            for key, table in tables.items():
                self.files[key].close(table)

        on_first(make_room)
        with ending_alone():
            for side in sides:
                name = side.cache.folder.name
                self._fill([tables[name, column] for column in self.asked.columns if tables], side, params)
        on_first(close)

    def _fill(self, tables: list[np.ndarray], batches: Batches, params: Params) -> None:
        """tables: of the columns, on the first process; none on others."""
        is_first, ask = jax.process_index() == 0, jax.jit(self.asked.ask)
        for batch in tracked(batches.eval_batches(), f"the {self.asked.name}", batches.eval_steps(), show=is_first):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                placed = shard_batch(batch, self.mesh)
                found = (placed.pop("places"), *ask(params, placed))
            if jax.process_count() > 1:
                found = multihost_utils.process_allgather(found, tiled=True)
            if is_first:
                places, *values = (np.asarray(array) for array in found)
                rows = places[..., 0].astype(np.int64) << 31 | places[..., 1]
                for table, value in zip(tables, values, strict=True):
                    table[rows[rows >= 0]] = value[rows >= 0]


class _Table(NamedTuple):
    """The file of a column of answers: numbers alone, mapped on a disk, and whole in memory in an object store."""

    file: Path
    dtype: type
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def is_whole(self) -> bool:
        # Objects appear whole.
        return is_remote(self.file) or (self.file.is_file() and self.file.stat().st_size == self.size)

    def create(self) -> np.ndarray:
        """Zeros; on a disk their room is taken, so that a full one is told now. Raises OSError."""
        if is_remote(self.file):
            return np.zeros(self.shape, self.dtype)
        with self.file.open("wb") as stream:
            for begin in range(0, self.size, 2**24):
                stream.write(bytes(min(2**24, self.size - begin)))
        return np.memmap(self.file, self.dtype, "r+", shape=self.shape)

    def close(self, table: np.ndarray) -> None:
        self.file.write_bytes(table.tobytes()) if is_remote(self.file) else table.flush()

    def read(self) -> np.ndarray:
        if is_remote(self.file):
            return np.frombuffer(self.file.read_bytes(), self.dtype).reshape(self.shape)
        return np.memmap(self.file, self.dtype, "r", shape=self.shape)
