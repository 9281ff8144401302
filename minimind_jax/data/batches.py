"""The batches of every step of a run, from its epochs.

Row i of an epoch is a pure function of (cache, seed, epoch, i), and step s takes rows [s * R, (s + 1) * R) of its
epoch. So the step number is all there is to save: iteration starts anywhere at once, and neither the number of
processes nor of loader threads changes what a step holds.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np

from minimind_jax.agreement import check_agreement, on_all
from minimind_jax.config.sections import FilesConfig
from minimind_jax.config.stages import RunConfig
from minimind_jax.data.epoch import Annotate, Epoch, check_rows, describe_cuts, plan_epoch
from minimind_jax.data.kinds import KINDS, KindName
from minimind_jax.data.labelled_images import Wordless
from minimind_jax.data.labels import Classes
from minimind_jax.data.pictures import Marker
from minimind_jax.data.rows import Batch
from minimind_jax.data.token_cache import TokenCache, build_cache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.seeds import named_seed
from minimind_jax.sharding import announce

READ_AHEAD = 4  # blocks of steps
BLOCK_STEPS, BLOCK_POSITIONS = 8, 2**16  # the most that are gathered at once, if they are several steps


class Batches:
    """The batches of a run: which rows each step holds, and this process's share of them.

    cache: of epoch 0. rows_per_step: over all processes. token_bytes: (V,) of `Tokenizer.token_bytes`.
    select: the documents of a cache that are meant (all by default). annotate: see `Epoch`. role: what messages call
    the data. redraw: of an epoch from 1 and whether it is made ahead (and nothing shown of it), its cache, where the
    template's chances are drawn anew for each; by default all have the same.

    The last step of an epoch is filled up with rows of padding. An epoch of a redrawn cache may be some rows longer
    or shorter than epoch 0, which `steps_per_epoch` speaks of.

    Raises UserError if there is nothing to train on, here or where a redrawn epoch begins.
    """

    def __init__(
        self,
        cache: TokenCache,
        data: FilesConfig,
        rows_per_step: int,
        seed: int,
        token_bytes: np.ndarray,
        process_index: int = 0,
        process_count: int = 1,
        *,
        select: Callable[[TokenCache], np.ndarray] | None = None,
        redraw: Callable[[int, bool], TokenCache] | None = None,
        annotate: Annotate | None = None,
        role: str = "data",
    ):
        self.cache, self.data, self.rows_per_step, self.seed = cache, data, rows_per_step, seed
        self.token_bytes, self.process_index, self.process_count = token_bytes, process_index, process_count
        self._select = select or (lambda cache: np.arange(len(cache)))
        self._redraw, self._annotate, self.role = redraw, annotate, role
        self.pictures = ""  # a hash of what is in them, where it was looked at once
        self._lock = threading.RLock()  # loader threads share the epochs
        self._epochs: dict[int, Epoch] = {}
        self._ahead: dict[int, concurrent.futures.Future[Epoch]] = {}
        self._first_steps = [0]
        self.plan = self.epoch(0).plan
        check_rows(self.epoch(0), self.role)

    @property
    def keys(self) -> np.ndarray:
        """(documents,) of `TokenCache.keys`, those that are meant; none in a cache of an earlier version."""
        return self.cache.keys[self._select(self.cache)] if len(self.cache.keys) else self.cache.keys

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
        """The rows of an epoch, made when first asked for or ahead of that; the newest two are kept."""
        with self._lock:
            if epoch not in self._epochs:
                ahead = self._ahead.pop(epoch, None)
                if ahead is not None and not ahead.done() and self._redraw:
                    announce(f"{self.role} of epoch {epoch + 1} is still being tokenised; the run waits for it")
                planned = self._make(epoch) if ahead is None else ahead.result()
                self._epochs = {e: kept for e, kept in self._epochs.items() if e >= epoch - 1}
                self._epochs[epoch] = planned
                if self._redraw and epoch:  # of other tokens than the first, of which the run's facts speak
                    check_rows(planned, f"{self.role} of epoch {epoch + 1}")
                    if told := describe_cuts(planned):
                        announce(f"{self.role} of epoch {epoch + 1}: {told}")
            return self._epochs[epoch]

    def _make(self, epoch: int, *, ahead: bool = False) -> Epoch:
        cache = self._redraw(epoch, ahead) if self._redraw and epoch else self.cache
        return plan_epoch(cache, self._select(cache), self.data, self.seed, epoch, annotate=self._annotate)

    def _make_ahead(self, epoch: int) -> None:
        """Begins to make an epoch, in a thread that does not outlive the program."""
        with self._lock:
            if epoch in self._epochs or epoch in self._ahead:
                return
            made = self._ahead[epoch] = concurrent.futures.Future()

        def work() -> None:
            try:
                made.set_result(self._make(epoch, ahead=True))
            except BaseException as error:  # told where the epoch is asked for
                made.set_exception(error)

        threading.Thread(target=work, name=f"epoch {epoch + 1}", daemon=True).start()

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run."""
        if self._redraw is None:
            return divmod(step, self.steps_per_epoch)
        with self._lock:
            while self._first_steps[-1] <= step:
                steps = self.epoch(len(self._first_steps) - 1).steps(self.rows_per_step)
                self._first_steps.append(self._first_steps[-1] + steps)
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            return epoch, step - self._first_steps[epoch]

    def iterate(self, start_step: int, steps: int) -> Iterator[Batch]:
        """This process's rows of the steps [start_step, start_step + steps) of the run, of each arrays
        (rows_per_step / processes, T); read ahead, and each next epoch is made ahead."""
        last = start_step + steps

        def read(steps: range) -> list[Batch]:
            found = []
            for epoch, places in itertools.groupby(map(self.locate, steps), key=operator.itemgetter(0)):
                found += self._gather(self.epoch(epoch), [within for _, within in places])
            epoch, within = self.locate(steps[-1])
            if steps[-1] - within + self.epoch(epoch).steps(self.rows_per_step) < last:
                self._make_ahead(epoch + 1)
            return found

        return self._read(read, start_step, last)

    def eval_batches(self, max_rows: int = 0) -> Iterator[Batch]:
        """This process's rows of the first `max_rows` rows (0: all), in an order that no seed or step changes."""
        return self._read(lambda steps: self._gather(self._evaluation, steps, max_rows), 0, self.eval_steps(max_rows))

    def eval_steps(self, max_rows: int = 0) -> int:
        """How many batches `eval_batches` gives."""
        rows = self._evaluation.plan.rows
        return -(-min(max_rows or rows, rows) // self.rows_per_step)

    @functools.cached_property
    def _evaluation(self) -> Epoch:
        shuffled = dataclasses.replace(self.data, shuffle=True)  # so that the first rows stand for all
        return plan_epoch(self.cache, self._select(self.cache), shuffled, 0, 0, annotate=self._annotate)

    def _gather(self, epoch: Epoch, steps: Sequence[int], max_rows: int = 0) -> list[Batch]:
        """This process's rows of these steps of an epoch, of which only the first `max_rows` count (0: all)."""
        share = self.rows_per_step // self.process_count
        firsts = [step * self.rows_per_step + self.process_index * share for step in steps]
        places = [place for first in firsts for place in range(first, first + share)]
        if max_rows:
            places = [place if place < max_rows else epoch.plan.rows for place in places]
        gathered = epoch.rows(places, self.token_bytes)
        parts = [slice(begin, begin + share) for begin in range(0, len(places), share)]
        return [{name: array[part] for name, array in gathered.items()} for part in parts]

    def _read(self, read: Callable[[range], list[Batch]], first: int, last: int) -> Iterator[Batch]:
        """`read` of the steps [first, last), ahead of what is asked for by `loader_workers` threads.

        Steps are gathered in blocks, for a thread and NumPy take their time by the call rather than by the row. No
        block has more than an epoch, whose first step would wait for all of it, any of a redrawn one's beside others,
        or the pictures of several steps.
        """
        if last <= first:
            return
        positions = self.rows_per_step // self.process_count * self.data.seq_len
        block = max(1, min(BLOCK_STEPS, BLOCK_POSITIONS // positions, self.steps_per_epoch))
        block = 1 if self._redraw or self.cache.pictures is not None else block
        threads = self.data.loader_workers
        ahead = max(READ_AHEAD, threads) if threads else 0
        blocks = grain.MapDataset.range(first, last, block).map(lambda at: read(range(at, min(at + block, last))))
        iterator = iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
        try:
            for batches in iterator:
                yield from batches
        finally:
            iterator.close()


def open_data(
    kind: KindName,
    config: RunConfig,
    tokenizer: Tokenizer | Wordless,
    process_index: int = 0,
    process_count: int = 1,
    *,
    classes: Classes | None = None,
    marker: Marker | None = None,
    annotate: Annotate | None = None,
) -> tuple[Batches, Batches | None]:
    """A stage's training and validation batches; the latter None without `data.val` and `data.val_fraction`.

    Builds the caches if there are none yet; the first process speaks of it. Raises UserError for what is wrong with the
    data, and where the data of the processes differ.
    """
    data, seed = config.data, config.seed
    fraction = config.figures.val_fraction if data.val_fraction is None else data.val_fraction
    fraction = 0.0 if data.val else fraction
    redraws = KINDS[kind].rendered and data.redraw_each_epoch

    def build(files: tuple[str, ...], epoch: int = 0, quiet: bool = False) -> TokenCache:
        speaks = jax.process_index() == 0 and not quiet
        wanted = {"classes": classes, "marker": marker}
        return build_cache(kind, files, tokenizer, data, seed, epoch, speaks, report_skipped=speaks, **wanted)

    def make(cache: TokenCache, role: str, side: int | None = None, **more) -> Batches:
        """side: of `split_records`; None for all documents."""
        select = None if side is None else lambda cache: split_records(cache.records, fraction, seed)[side]
        token_bytes, processes = tokenizer.token_bytes(), (process_index, process_count)
        more |= {"select": select, "annotate": annotate, "role": role}
        return Batches(cache, data, config.rows_per_step, seed, token_bytes, *processes, **more)

    def open_own() -> tuple[Batches, Batches | None]:
        cache = build(data.train)
        train = make(cache, "training data", 0, redraw=functools.partial(build, data.train) if redraws else None)
        if data.val:
            return train, make(build(data.val), "validation data")
        has_held_out = len(split_records(cache.records, fraction, seed)[1])
        return train, make(cache, "validation data", 1) if has_held_out else None

    pair = on_all(open_own)
    if pair[1] is not None and (told := _trained_on(*pair)):
        announce(told)
    check_agreement({key: value for batches in pair if batches is not None for key, value in batches.agreed().items()})
    return pair


def _trained_on(train: Batches, held_out: Batches) -> str:
    """What is told of held-out records that say the same as some to train on; "" if there are none."""
    known, asked = train.keys, held_out.keys
    found = np.isin(asked, known).sum() if len(known) and len(asked) else 0
    what = f"{len(asked):,} held-out {KINDS[train.cache.kind].noun}"
    return f"warning: {found:,} of the {what} are trained on, too, and tell nothing of new ones" * bool(found)


def split_records(records: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) places in `records`; a record's side depends on its number, the fraction and the seed
    alone. At least one is held out if the fraction is above 0 and there are two."""
    draws = _hash01(records, named_seed(seed, "validation"))
    held_out = draws < fraction
    if fraction and len(records) > 1:
        held_out[np.argmin(draws)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _hash01(numbers: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finaliser: a float in [0, 1) for each integer."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64
