"""Token cache and packing plan -> the batches of every step.

Row i of an epoch is a pure function of (cache, seed, epoch, i), and step s takes rows [s * R, (s + 1) * R) of its
epoch. So the step number is all there is to save: iteration starts anywhere at once, and neither the number of
processes nor of loader threads changes what a step holds.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from minimind_jax.agreement import check_agreement, on_all
from minimind_jax.config.sections import DataConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.data.cuts import check_rows, describe_cuts
from minimind_jax.data.labels import Classes
from minimind_jax.data.packing import PackingPlan, plan_best_fit, plan_concat, plan_heads, plan_pad, plan_pairs
from minimind_jax.data.token_cache import TokenCache, build_cache
from minimind_jax.data.tokenise import RENDERED, Kind
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.seeds import named_seed
from minimind_jax.sharding import announce

Batch = dict[str, np.ndarray]

Piece = tuple[int, int, int]  # document of the cache, start, stop
# Of a cache and the pieces of a row in order: more arrays for the row, of one shape for all rows.
Annotate = Callable[[TokenCache, list[Piece]], Batch]

READ_AHEAD = 4  # steps


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of one epoch.

    documents: (n,) documents of the cache the plan is about. order: row of the plan at each place of the epoch.
    packing: `data.packing`; for kinds with one of their own, the kind. annotate: adds to a row what belongs to its
    pieces.
    """

    cache: TokenCache
    documents: np.ndarray
    plan: PackingPlan
    order: grain.MapDataset
    packing: str
    annotate: "Annotate | None" = None

    def row(self, index: int, token_bytes: np.ndarray) -> Batch:
        """Row `index` of the epoch: arrays (T,), all padding beyond the last row."""
        pieces: list[Piece] = []
        if index < self.plan.rows:
            pieces = [(int(self.documents[d]), start, stop) for d, start, stop in self.plan.pieces(self.order[index])]
        if self.packing == "pad" and pieces:
            row = pad_row(self.cache, pieces[0][0], self.plan.seq_len, token_bytes)
        else:
            row = pack_row(self.cache, pieces, self.plan.seq_len, token_bytes)
        return row | self.annotate(self.cache, pieces) if self.annotate else row


def pack_row(
    cache: TokenCache,
    pieces: list[Piece],
    seq_len: int,
    token_bytes: np.ndarray,
) -> Batch:
    """One row from its pieces (document, start, stop): arrays (T,).

    tokens, targets int32: targets[t] is the next token of the same document; a piece that was cut off has its last
        target, too: the token the next piece begins with.
    loss_weights float32: 1 where the target is trained, 0 where it is not, where there is none, and on padding.
    positions, segment_ids int32: from 0 in each piece; pieces count from 1, padding is 0.
    target_bytes int32: UTF-8 bytes of the targets that are trained.
    """
    row = {name: np.zeros(seq_len, np.int32) for name in ("targets", "positions", "segment_ids", "target_bytes")}
    row["tokens"] = np.full(seq_len, cache.info["pad_id"], np.int32)
    row["loss_weights"] = np.zeros(seq_len, np.float32)
    place = 0
    for segment, (document, start, stop) in enumerate(pieces, start=1):
        ids = cache.ids(document, start, stop + 1)
        trained = cache.is_trained(document, start, stop + 1)[1:]
        here = slice(place, place + stop - start)
        with_target = slice(place, place + len(trained))
        row["tokens"][here] = ids[: stop - start]
        row["targets"][with_target] = ids[1:]
        row["loss_weights"][with_target] = trained
        row["target_bytes"][with_target] = np.where(trained, token_bytes[ids[1:]], 0)
        row["positions"][here] = np.arange(stop - start)
        row["segment_ids"][here] = segment
        place += stop - start
    return row


def pad_row(cache: TokenCache, document: int, seq_len: int, token_bytes: np.ndarray) -> Batch:
    """MiniMind's row: the first `seq_len` tokens of one document; text keeps its end token when it is cut.

    As `pack_row`, but a document that was cut off has no target beyond the row.
    """
    row = pack_row(cache, [(document, 0, min(int(cache.lengths[document]), seq_len))], seq_len, token_bytes)
    if cache.lengths[document] > seq_len:
        for name in ("targets", "loss_weights", "target_bytes"):
            row[name][-1] = 0
        if cache.kind == "text":
            row["tokens"][-1] = row["targets"][-2] = cache.info["eos_id"]
            row["target_bytes"][-2] = token_bytes[cache.info["eos_id"]]
    return row


class Batches:
    """The batches of a run: which rows each step holds, and this process's share of them.

    cache: of epoch 0. rows_per_step: over all processes. token_bytes: (V,) of `Tokenizer.token_bytes`.
    select: the documents of a cache that are meant (all by default). redraw: the cache of a later epoch, where the
    template's chances are drawn anew for each (the same cache by default). annotate: see `Epoch`.
    role: what messages call the data.

    The last step of an epoch is filled up with rows of padding. An epoch of a redrawn cache may be some rows longer
    or shorter than epoch 0, which `rows_per_epoch` and `steps_per_epoch` speak of.

    Raises UserError if the rows of a step do not divide by the processes, and if there is nothing to train on, here or
    where a redrawn epoch begins.
    """

    def __init__(
        self,
        cache: TokenCache,
        data: DataConfig,
        rows_per_step: int,
        seed: int,
        token_bytes: np.ndarray,
        process_index: int = 0,
        process_count: int = 1,
        *,
        select: Callable[[TokenCache], np.ndarray] | None = None,
        redraw: Callable[[int], TokenCache] | None = None,
        annotate: Annotate | None = None,
        role: str = "data",
    ):
        if rows_per_step % process_count:
            raise UserError(
                f"the {rows_per_step} rows of a step do not divide by the {process_count} processes; "
                f"set training.batch_tokens to a multiple of {data.seq_len * process_count} (data.seq_len * processes)"
            )
        self.cache, self.data, self.rows_per_step, self.seed = cache, data, rows_per_step, seed
        self.token_bytes, self.process_index, self.process_count = token_bytes, process_index, process_count
        self._select = select or (lambda cache: np.arange(len(cache)))
        self._redraw, self._annotate, self.role = redraw, annotate, role
        self._lock = threading.RLock()  # loader threads share the plans
        self._epochs: dict[int, Epoch] = {}
        self._first_steps = [0]
        self.plan = self.epoch(0).plan
        check_rows(self.epoch(0), self.role)

    @property
    def rows_per_epoch(self) -> int:
        return self.plan.rows

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.plan.rows // self.rows_per_step)

    @property
    def trained_tokens_per_epoch(self) -> int:
        """Targets of an epoch; an estimate where documents are held out or cut off."""
        return round(self.cache.info["trained_tokens"] * self.plan.tokens / self.cache.info["tokens"])

    def agreed(self) -> dict[str, str | int]:
        """What must be the same for all processes, by name."""
        info = self.cache.info
        found = {
            **{"records": info["documents"], "records skipped": info["skipped"], "tokens": info["tokens"]},
            "content of the files (hash)": self.cache.content,
            "tokenizer and rendering (hash)": self.cache.made_of,
            "rows of an epoch": self.plan.rows,
        }
        return {f"{self.role}: {name}": value for name, value in found.items()}

    def epoch(self, epoch: int) -> Epoch:
        """The rows of an epoch; planned when first asked for, and the newest two kept."""
        with self._lock:
            if epoch not in self._epochs:
                cache = self._redraw(epoch) if self._redraw and epoch else self.cache
                self._epochs = {e: kept for e, kept in self._epochs.items() if e >= epoch - 1}
                self._epochs[epoch] = planned = self._plan(cache, self.data, self.seed, epoch)
                self._tell_redrawn(epoch, planned)
            return self._epochs[epoch]

    def _tell_redrawn(self, epoch: int, planned: Epoch) -> None:
        """What is cut of an epoch of other tokens than the first; of that the run's facts speak."""
        if self._redraw and epoch:
            check_rows(planned, f"{self.role} of epoch {epoch + 1}")
            if told := describe_cuts(planned):
                announce(f"{self.role} of epoch {epoch + 1}: {told}")

    def _plan(self, cache: TokenCache, data: DataConfig, seed: int, epoch: int) -> Epoch:
        planned = plan_epoch(cache, self._select(cache), data, seed, epoch)
        return dataclasses.replace(planned, annotate=self._annotate)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run."""
        if self._redraw is None:
            return divmod(step, self.steps_per_epoch)
        with self._lock:
            while self._first_steps[-1] <= step:
                rows = self.epoch(len(self._first_steps) - 1).plan.rows
                self._first_steps.append(self._first_steps[-1] - (-rows // self.rows_per_step))
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            return epoch, step - self._first_steps[epoch]

    def row(self, index: int) -> Batch:
        """Row of the run: number index % rows_per_step of step index // rows_per_step."""
        step, place = divmod(index, self.rows_per_step)
        epoch, step = self.locate(step)
        return self.epoch(epoch).row(step * self.rows_per_step + place, self.token_bytes)

    def iterate(self, start_step: int, steps: int) -> Iterator[Batch]:
        """This process's rows of the steps [start_step, start_step + steps): arrays (rows_per_step / processes, T)."""
        first, last = start_step * self.rows_per_step, (start_step + steps) * self.rows_per_step
        return self._read(self.row, first, last)

    def eval_batches(self, max_rows: int = 0) -> Iterator[Batch]:
        """This process's rows of the first `max_rows` rows (0: all), in an order that no seed or step changes."""
        epoch = self._evaluation
        rows = min(max_rows or epoch.plan.rows, epoch.plan.rows)
        padding = epoch.plan.rows

        def row(index: int) -> Batch:
            return epoch.row(index if index < rows else padding, self.token_bytes)

        return self._read(row, 0, self.eval_steps(max_rows) * self.rows_per_step)

    def eval_steps(self, max_rows: int = 0) -> int:
        """How many batches `eval_batches` gives."""
        rows = self._evaluation.plan.rows
        return -(-min(max_rows or rows, rows) // self.rows_per_step)

    @functools.cached_property
    def _evaluation(self) -> Epoch:
        shuffled = dataclasses.replace(self.data, shuffle=True)  # so that the first rows stand for all
        return self._plan(self.cache, shuffled, seed=0, epoch=0)

    def _read(self, row: Callable[[int], Batch], first: int, last: int) -> Iterator[Batch]:
        """Rows [first, last) in steps, of each step this process's slice, read ahead by `loader_workers` threads."""
        if last <= first:
            return
        rows = grain.MapDataset.source(_RowSource(row, last))[first:]
        steps = rows.batch(self.rows_per_step // self.process_count)[self.process_index :: self.process_count]
        threads = self.data.loader_workers
        ahead = max(READ_AHEAD, threads) if threads else 0
        iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
        try:
            yield from iterator
        finally:
            iterator.close()


@dataclasses.dataclass(frozen=True)
class _RowSource:
    """Rows by number, as grain wants them."""

    row: Callable[[int], Batch]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return self.row(int(index))


def plan_epoch(cache: TokenCache, documents: np.ndarray, data: DataConfig, seed: int, epoch: int) -> Epoch:
    """Packs these documents of a cache for one epoch and draws the order of the rows."""
    lengths = cache.lengths[documents]
    targets = functools.partial(_count_targets, cache, documents)
    places = functools.partial(_turns, cache, documents), data.seq_len, seed, epoch, data.shuffle
    starts = functools.partial(_message_starts, cache, documents)
    if cache.kind == "preference":
        plan = plan_pairs(lengths, *places, starts)
    elif cache.kind == "labelled":
        plan = plan_heads(lengths, data.seq_len, seed, epoch, data.shuffle)
    elif data.packing == "concat":
        plan = plan_concat(lengths, data.seq_len, seed, epoch, data.shuffle, targets)
    elif data.packing == "best_fit":
        is_chat = cache.kind == "conversation"  # of text a last token alone is left untrained, which costs nothing
        plan = plan_best_fit(lengths, *places, *((starts, targets) if is_chat else ()))
    else:
        plan = plan_pad(lengths, data.seq_len, targets)
    order = grain.MapDataset.range(plan.rows)
    if data.shuffle and plan.rows:
        order = order.shuffle(seed=named_seed(seed, "rows", epoch) % 2**32)
    packing = data.packing if cache.kind in ("text", "conversation") else cache.kind
    return Epoch(cache, documents, plan, order, packing)


def _turns(cache: TokenCache, documents: np.ndarray, index: int) -> np.ndarray:
    return cache.turns(documents[index])


def _message_starts(cache: TokenCache, documents: np.ndarray, index: int) -> np.ndarray:
    """Where messages may begin in a conversation or pair: at every token like that of its first turn, or its second."""
    document = documents[index]
    ids, turns = cache.ids(document, 0, int(cache.lengths[document])), cache.turns(document)
    first = turns[1] if cache.kind == "conversation" and len(turns) > 1 else 0
    return np.flatnonzero((ids == ids[0]) | (ids == ids[first]))


def _count_targets(cache: TokenCache, documents: np.ndarray, pieces, starts, stops) -> np.ndarray:
    """Trained targets of the pieces [start, stop) of these documents, (pieces,); as `pack_row` weighs them."""
    own = documents[pieces]
    first = cache.offsets[own] + starts + 1
    last = np.minimum(cache.offsets[own] + stops + 1, cache.offsets[own + 1])
    if cache.trained is None:
        return np.maximum(last - first, 0)
    counts, some = np.zeros(len(first), np.int64), np.flatnonzero(last > first)
    some = some[np.argsort(first[some], kind="stable")]  # in the order of the file, which is then read once
    if len(some):
        first, end = first[some], last[some] - 1
        sums = np.add.reduceat(cache.trained, np.stack([first, end], axis=1).ravel(), dtype=np.int64)[::2]
        counts[some] = np.where(first < end, sums, 0) + cache.trained[end]
    return counts


def split_documents(cache: TokenCache, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) documents; a record's side depends on its number, the fraction and the seed alone.

    At least one document is held out if the fraction is above 0 and there are two.
    """
    draws = _hash01(np.asarray(cache.records), named_seed(seed, "validation"))
    held_out = draws < fraction
    if fraction and len(cache) > 1:
        held_out[np.argmin(draws)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _hash01(numbers: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser: a float in [0, 1) for each integer."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


def open_data(
    kind: Kind,
    config: PretrainConfig,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    *,
    classes: Classes | None = None,
    annotate: Annotate | None = None,
) -> tuple[Batches, Batches | None]:
    """A stage's training and validation batches; the latter None without `data.val` and `data.val_fraction`.

    Builds the caches if there are none yet; the first process speaks of it. Raises UserError for what is wrong with the
    data, and where the data of the processes differ.
    """
    own = functools.partial(_open_own, kind, config, tokenizer, process_index, process_count, classes, annotate)
    pair = on_all(own)
    check_agreement({key: value for batches in pair if batches is not None for key, value in batches.agreed().items()})
    return pair


def _open_own(
    kind: Kind,
    config: PretrainConfig,
    tokenizer: Tokenizer,
    process_index: int,
    process_count: int,
    classes: Classes | None,
    annotate: Annotate | None,
) -> tuple[Batches, Batches | None]:
    """`open_data` of one process."""
    data, seed, speaks = config.data, config.seed, jax.process_index() == 0
    build = functools.partial(build_cache, kind, progress=speaks, report_skipped=speaks, classes=classes)
    cache = build(data.train, tokenizer, data, seed)
    fraction = config.figures.val_fraction if data.val_fraction is None else data.val_fraction
    fraction = 0.0 if data.val else fraction
    make = functools.partial(
        Batches,
        data=data,
        rows_per_step=config.rows_per_step,
        seed=seed,
        token_bytes=tokenizer.token_bytes(),
        process_index=process_index,
        process_count=process_count,
        annotate=annotate,
    )

    def redraw(epoch: int) -> TokenCache:
        return build(data.train, tokenizer, data, seed, epoch)

    train = make(
        cache,
        role="training data",
        select=lambda c: split_documents(c, fraction, seed)[0],
        redraw=redraw if data.redraw_each_epoch and kind in RENDERED else None,
    )
    if data.val:
        return train, make(build(data.val, tokenizer, data, seed), role="validation data")
    if not len(split_documents(cache, fraction, seed)[1]):
        return train, None
    return train, make(cache, role="validation data", select=lambda c: split_documents(c, fraction, seed)[1])
