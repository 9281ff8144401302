"""A teacher's likeliest words of every token, computed once and kept in the run's folder."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from minimind_jax.config.stages import DistillConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.open import open_data
from minimind_jax.data.rows import Batch, Pieces
from minimind_jax.data.token_cache import TokenCache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.losses.distillation import teacher_likeliest
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.paths import is_remote
from minimind_jax.progress import tracked
from minimind_jax.sharding import announce, data_process, make_mesh, shard_batch
from minimind_jax.texts import is_there, read_object
from minimind_jax.training.run import RunFolder
from minimind_jax.training.state import fingerprint

Table = tuple[np.ndarray, np.ndarray]  # ids and log_probs of a cache's tokens, (tokens, k) each, read from the disk


class StoredTeacher:
    """What `losses.distillation.likeliest` finds for every token of a run's data.

    `annotate` gives rows `teacher_ids` int32 and `teacher_log_probs` float32, (rows, T, k). A token's words are those
    behind the tokens before it in its row's piece; so pieces must be the same in every epoch.

    Raises UserError for settings under which they are not, and when the tables cannot be written.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: LanguageModel,
        params: Params,
        words: int,
        tokenizer: Tokenizer,
        run: RunFolder,
    ):
        _check(config, words, run)
        self.config, self.teacher, self.words = config, teacher, words
        self.mesh = make_mesh(config.mesh)
        pair = open_data("conversation", config, tokenizer, *data_process(self.mesh), annotate=self._places)
        caches = {batches.cache.folder.name: batches.cache for batches in pair if batches is not None}
        self.folder = run.path / "teacher"
        wanted = config.teacher
        made_of = {
            "teacher": fingerprint(params), "top_k": wanted.top_k, "temperature": wanted.temperature, "words": words,
            "seq_len": config.data.seq_len, "packing": config.data.packing, "caches": sorted(caches),
        }  # fmt: skip
        record = self.folder / "made_of.json"
        earlier = read_object(record, "remove it, to ask the teacher again") if is_there(record) else None
        if earlier and earlier["teacher"] != made_of["teacher"] and run.checkpoint_steps():
            raise UserError(
                f"teacher.model {config.teacher.model} (or compute.dtype) has changed since {run.path} was started; "
                "restore it, or start another run"
            )
        if earlier != made_of:
            self._make([batches for batches in pair if batches is not None], caches, params, made_of)
        multihost_utils.sync_global_devices("stored teacher")
        self.tables = {name: self._open(name, "r") for name in caches}

    def annotate(self, cache: TokenCache, pieces: Pieces) -> Batch:
        ids, log_probs = (table[pieces.sources(cache)] for table in self.tables[cache.folder.name])
        found = {"teacher_ids": ids.astype(np.int32), "teacher_log_probs": log_probs}
        for array in found.values():
            array[pieces.is_padding] = 0
        return found

    def _places(self, _: TokenCache, pieces: Pieces) -> Batch:
        """documents, places int32 (rows, T): where each token is; -1 for padding."""
        documents, starts = pieces.each(pieces.documents, -1), pieces.each(pieces.starts, -1)
        return {"documents": documents.astype(np.int32), "places": (starts + pieces.positions).astype(np.int32)}

    def _make(self, sides: list[Batches], caches: dict[str, TokenCache], params: Params, made_of: dict) -> None:
        k = self.config.teacher.top_k
        tokens = sum(len(cache.tokens) for cache in caches.values())
        size = tokens * k * (4 + self._id_type().itemsize) / 2**20
        announce(f"asking the teacher once for the {k} likeliest words of {tokens:,} tokens ({size:,.1f} MiB)")
        tables: dict[str, Table] = {}
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "made_of.json").unlink(missing_ok=True)
                (self.folder / "made_of.partial").write_text(json.dumps(made_of), "utf-8")
                for name, cache in caches.items():
                    _reserve(self._files(name), len(cache.tokens) * k, (self._id_type().itemsize, 4))
                    tables[name] = self._open(name, "r+")
            except OSError as error:
                raise UserError(
                    f"{self.folder}: cannot write {size:,.1f} MiB: {error.strerror}; make room, or lower teacher.top_k"
                ) from error
        for side in sides:
            self._fill(tables.get(side.cache.folder.name), side, params)
        for table in tables.values():
            for array in table:
                array.flush()
        if jax.process_index() == 0:
            (self.folder / "made_of.partial").replace(self.folder / "made_of.json")

    def _fill(self, table: Table | None, batches: Batches, params: Params) -> None:
        """Asks the teacher for all rows of `batches`; process 0 has the table."""
        wanted = self.config.teacher

        @jax.jit
        def ask(params, batch):
            return teacher_likeliest(self.teacher, params, batch, wanted.top_k, self.words, wanted.temperature)

        is_first = jax.process_index() == 0
        for batch in tracked(batches.eval_batches(), "the teacher", batches.eval_steps(), show=is_first):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                placed = shard_batch(batch, self.mesh)
                found = (placed.pop("documents"), placed.pop("places"), *ask(params, placed))
            if jax.process_count() > 1:
                found = multihost_utils.process_allgather(found, tiled=True)
            if table is not None:
                documents, places, *values = (np.asarray(array) for array in found)
                is_token = documents >= 0
                rows = batches.cache.offsets[documents[is_token]] + places[is_token]
                for array, value in zip(table, values, strict=True):
                    array[rows] = value[is_token]

    def _id_type(self) -> np.dtype:
        return np.dtype(np.uint16 if self.words <= 2**16 else np.uint32)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.ids", self.folder / f"{name}.log_probs"

    def _open(self, name: str, mode: str) -> Table:
        types = self._id_type(), np.dtype(np.float32)
        arrays = (np.memmap(file, dtype, mode) for file, dtype in zip(self._files(name), types, strict=True))
        ids, log_probs = (array.reshape(-1, self.config.teacher.top_k) for array in arrays)
        return ids, log_probs


def _check(config: DistillConfig, words: int, run: RunFolder) -> None:
    if config.teacher.top_k > words:
        raise UserError(f"teacher.top_k {config.teacher.top_k} is above the vocabulary of {words} words")
    if is_remote(run.path):
        raise UserError(f"teacher.top_k needs a run on a disk, not {run.path}; set it to 0, or choose another run")
    if config.data.packing == "concat":
        raise UserError(
            "data.packing concat cuts documents at other places in every epoch, so a stored teacher would not fit; "
            "choose best_fit or pad, or teacher.top_k 0"
        )
    if config.data.redraw_each_epoch:
        raise UserError(
            "data.redraw_each_epoch changes the conversations in every epoch, so a stored teacher would not fit; drop "
            "it, or choose teacher.top_k 0"
        )


def _reserve(files: tuple[Path, ...], count: int, sizes: tuple[int, ...]) -> None:
    """Files of `count` numbers each, with their room on the disk, so that a full one is told now. Raises OSError."""
    for file, size in zip(files, sizes, strict=True):
        with file.open("wb") as stream:
            rest = count * size
            while rest:
                rest -= stream.write(bytes(min(rest, 2**24)))
