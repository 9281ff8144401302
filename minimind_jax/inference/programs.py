"""What the engine has on the device, and the compiled functions that work on it: the host's tasks go in, and what was
sampled comes out, as NumPy.

A program takes some rows of the cache, or all of them. Those of some rows pick them out, which costs little (16 of 64
rows of the 29.0M model on a CPU: 1 ms of 20), so that a lone request does not pay for others; in those of all, a task
stands where its row stands.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.inference import decode
from minimind_jax.inference.buckets import bucket, round_up
from minimind_jax.inference.image_encoder import ImageEncoder
from minimind_jax.inference.sampling import Counts, Sampled, SamplingValues
from minimind_jax.inference.scheduler import Copy, Task
from minimind_jax.model.transformer import LanguageModel, Params, compiler_options
from minimind_jax.model.vision import VISION
from minimind_jax.sharding import row_shards

GREEDY, PLAIN = SamplingConfig(temperature=0.0), SamplingConfig(temperature=1.0, top_k=0, top_p=1.0)  # of no task

MOST_STEPS = 32  # tokens of a row that one call makes
ENDED = 16  # a call ends early when one in so many rows has ended
ENDS = 8  # tokens that end a row, known to the device; of others the host knows
MOST_READ = 1.75  # times the tokens of a prompt, with padding: rather several parts than one that is mostly that
STEP = 4  # from one number of rows of a program to the next, where all are compiled before the first request


FEW_READERS = 16  # rows that are served at their best
CROWD = 4  # times as long may a call take beside more: what the host does between two calls grows with the rows


def patience(rows: int) -> int:
    """How many times as long a call may take that keeps so many rows waiting."""
    return CROWD if rows > FEW_READERS else 1


class Limits(NamedTuple):
    """Of tokens that are read at once. alone: padding counted. beside: while other rows run, a few. widths: of
    programs."""

    alone: int
    beside: int
    widths: tuple[int, ...]


LIMITS = {"cpu": Limits(512, 64, (16, 64, 256))}
OTHER_LIMITS = Limits(4096, 512, (64, 512))


class Programs:
    """rows, length: of the cache, at first. is_fixed: it never grows, and a few programs do for everything; otherwise
    programs are compiled as they are needed, and one that is a little too large is used before another is compiled.
    adapters: names of those in the parameters, in their order. sizes: see `Engine`."""

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        rows: int,
        length: int,
        is_fixed: bool,
        adapters: Sequence[str] = (),
        sizes: Sequence[int] = (),
    ):
        self.model, self.is_fixed, self._sizes, self._mesh = model, is_fixed, sizes, _mesh_of(params)
        self._adapters = {"": -1, **{name: number for number, name in enumerate(adapters)}}
        self._place = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        self._twins = decode.FIXED if compiler_options(model.compute, model.platform) else {}
        self.limits = LIMITS.get(model.platform, OTHER_LIMITS)
        self.rows, self.length, self._cache = 0, 0, None
        self._settings: dict[int, tuple[list[Task], decode.Settings]] = {}
        self._nothing: dict[int, tuple[Counts, Array]] = {}
        self._made: set[int] = set()  # rows for which tokens were made
        self.image_encoder = None if model.config.vision is None else ImageEncoder(model.config.vision, self._look)
        self.load(params)
        self.reserve(rows, length)

    def load(self, params: Params) -> None:
        """Takes other parameters: as they are trained, cut over the same mesh, or as they are laid out already."""
        if self.image_encoder:
            self.image_encoder.clear()
        if isinstance(params["layers"], tuple):
            self.params = params
            return
        places = None
        if self._mesh is not None:  # what fsdp cuts would be gathered for each token
            places = tuple(_without_fsdp(leaf, self._place) for leaf in jax.tree.leaves(params))
        self.params = self._run(decode.lay_out, self.model, params, places)

    def reserve(self, rows: int, length: int) -> None:
        """Makes the cache at least as large."""
        shards = 1 if self._mesh is None else row_shards(self._mesh)
        rows, length = round_up(max(rows, self.rows), shards), max(length, self.length)
        if (rows, length) == (self.rows, self.length):
            return
        if self._cache is None:
            self._cache = self._run(decode.empty, self.model, rows, length)
        else:
            self._cache = self._run(decode.enlarge, self.model, self._cache, rows, length)
        self.rows, self.length = rows, length
        self._settings, self._made = {}, set()

    def clear(self) -> None:
        """An empty cache of the same size; the old one may be lost in a call that was given it."""
        self._cache = None  # there may be no room for two
        self._cache = self._run(decode.empty, self.model, self.rows, self.length)

    # Sizes of programs ------------------------------------------------------------------------------------------------

    def chunk(self, unread: int, running: int) -> tuple[int, int]:
        """(tokens that are read of a prompt, of how many prompts), where the first has so many left and so many rows
        wait for their next token meanwhile."""
        most = self.limits.beside * patience(running) if running else self.limits.alone
        widths = [width for width in self.limits.widths if width <= most]
        width = max((width for width in widths if round_up(unread, width) <= MOST_READ * unread), default=widths[0])
        if not self.is_fixed:
            return width, max(1, most // width)
        return width, max((rows for rows in self.steps if rows * width <= most), default=1)

    @property
    def steps(self) -> tuple[int, ...]:
        """Rows of programs that read, and of those that make tokens if nothing else was asked for, where all are
        compiled before the first request."""
        return self._up_to_all(STEP**n for n in range(20))

    def _up_to_all(self, sizes: Iterable[int]) -> tuple[int, ...]:
        if self._mesh is not None:  # rows that are cut over it cannot be picked out
            return (self.rows,)
        return (*sorted(size for size in sizes if 0 < size < self.rows), self.rows)

    def rows_for(self, tasks: int, reading: bool = False) -> int:
        """Rows of the program that takes so many tasks."""
        if self.is_fixed or self._mesh is not None:
            steps = self._up_to_all(self._sizes) if self._sizes and not reading else self.steps
            return next(rows for rows in steps if rows >= tasks)
        compiled = [] if reading else [rows for rows in self._made if tasks <= rows <= STEP * tasks]
        return min(compiled, default=min(bucket(tasks, smallest=1, multiple=self.rows), self.rows))

    def places(self, tasks: Sequence[Task], rows: int) -> list[int]:
        """Where tasks stand in the arrays of a program."""
        return [task.row.number for task in tasks] if rows == self.rows else list(range(len(tasks)))

    # Calls ------------------------------------------------------------------------------------------------------------

    def copy(self, copy: Copy) -> None:
        self._cache = self._run(decode.copy_row, self._cache, *map(np.int32, copy))

    def read(self, chunks: Sequence[tuple[Task, int]], width: int, rows: int) -> Array:
        """Reads so many more tokens of each task, `width` at most; logits behind them, (rows, V), still on the device.

        The newest token of a task that runs is read likewise, when it is not left to `make`.
        """
        tasks = [task for task, _ in chunks]
        tokens_BP, (starts_B, counts_B, lengths_B) = np.zeros((rows, width), np.int32), np.zeros((3, rows), np.int32)
        for place, (task, count) in zip(self.places(tasks, rows), chunks, strict=True):
            start = len(task.row.held)
            starts_B[place], counts_B[place], lengths_B[place] = start, count, len(task.ids)
            tokens_BP[place, :count] = task.ids[start : start + count]
        images_BPD = self._images_of(chunks, width, rows)
        from_start = self.model.platform != "cpu" and width > 1 and images_BPD is None and not starts_B.any()
        work = self._settings_of(tasks, rows), starts_B, counts_B, lengths_B, images_BPD
        return self._read(tokens_BP, *work, from_start=from_start)

    def _images_of(self, chunks: Sequence[tuple[Task, int]], width: int, rows: int) -> np.ndarray | None:
        """Image tokens of the markers among the next tokens of each row, in order, (rows, width, D) with room for as
        many as there may be; None where no picture is shown, which is another program."""
        if not any(task.answer.request.images for task, _ in chunks):
            return None
        found = self.image_encoder.tokens_of(chunks)
        if all(tokens is None for tokens in found):
            return None
        images_BPD = self._no_images(rows, width)
        for place, tokens in zip(self.places([task for task, _ in chunks], rows), found, strict=True):
            if tokens is not None:
                images_BPD[place, : len(tokens)] = tokens
        return images_BPD

    def _no_images(self, rows: int, width: int) -> np.ndarray:
        return np.zeros((rows, width, self.model.config.hidden_size), self.model.dtype)

    def choose(
        self, tasks: Sequence[Task], due: Sequence[Task], logits_BV: Array, masks: Mapping[Task, np.ndarray]
    ) -> Sampled:
        """The next token of the tasks that are due one, from the logits that `read` gave for `tasks`; one step.

        masks: of tokens that some of them may take (see `Constraint`).
        """
        rows = len(logits_BV)
        positions_B, allowed_BW = np.zeros(rows, np.int32), self._unused(rows)[1]
        if masks:
            allowed_BW = np.array(allowed_BW)
        for place, task in zip(self.places(tasks, rows), tasks, strict=True):
            positions_B[place] = len(task.ids)
            if task in masks:
                allowed_BW[place] = masks[task]
        settings, counts = self._settings_of(tasks, rows), self._counts_of(tasks, rows)
        allowed_BW = self._put(allowed_BW) if masks else allowed_BW
        sampled = jax.device_get(self._run(decode.choose, logits_BV, positions_B, settings, counts, allowed_BW))
        places = [place for place, task in zip(self.places(tasks, rows), tasks, strict=True) if task in due]
        return jax.tree.map(lambda all_B: all_B[None, places], sampled)

    def make(self, tasks: Sequence[Task], count: int) -> Sampled:
        """The next `count` tokens of each task, or fewer if some end, whose places may be others'; (steps, tasks) first
        in each array."""
        rows = self.rows_for(len(tasks))
        places = self.places(tasks, rows)
        newest_B, lengths_B, left_B = np.zeros((3, rows), np.int32)
        for place, task in zip(places, tasks, strict=True):
            newest_B[place], lengths_B[place], left_B[place] = task.ids[-1], len(task.ids), task.answer.room
        settings, counts = self._settings_of(tasks, rows), self._counts_of(tasks, rows)
        enough = max(1, len(tasks) // ENDED)
        sampled, made = self._make(newest_B, lengths_B, settings, counts, left_B, count, enough)
        self._made.add(rows)
        return jax.tree.map(lambda all_NB: all_NB[:made, places], sampled)

    def warm_up(self, report: Callable[[int, int], None]) -> None:
        """Compiles every program of a fixed cache, by calls that change nothing; report: gets (done, of how many)."""
        none = functools.partial(np.zeros, dtype=np.int32)
        reads = [(rows, 1) for rows in self.steps]
        reads += [
            (rows, width)
            for width in self.limits.widths
            for rows in self.steps
            if rows == self.steps[0] or rows * width <= self.limits.alone
        ]
        total = len(reads) + len(self.steps) + 1
        self.copy(Copy(0, 0, 0))
        if self.image_encoder:
            self.image_encoder.warm_up()
        for done, (rows, width) in enumerate(reads, 1):
            report(done - 1, total)
            settings, counts = self._settings_of([], rows), self._counts_of([], rows)
            work = none((rows, width)), settings, none(rows), none(rows), none(rows)
            for from_start in (False,) if self.model.platform == "cpu" or width == 1 else (False, True):
                logits_BV = self._read(*work, None, from_start=from_start)
            if self.image_encoder and width > 1:
                self._read(*work, self._no_images(rows, width), from_start=False)
            if width == 1:
                self._run(decode.choose, logits_BV, none(rows), settings, counts, self._unused(rows)[1])
                self._make(none(rows), none(rows), settings, counts, none(rows), 0, 1)
        report(total, total)

    # Arrays -----------------------------------------------------------------------------------------------------------

    def _run(self, program: Callable, *args: Any, **settings: Any) -> Any:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return self._twins.get(program, program)(*args, **settings)

    def _put(self, arrays: Any) -> Any:
        """Arrays of the host on the devices, where they stay for several calls."""
        return jax.device_put(arrays, self._place)

    def _look(self, pixels_NHWC: np.ndarray) -> Array:
        return self._run(decode.look, self.model, {VISION: self.params[VISION]}, pixels_NHWC)

    def _read(self, *work, from_start: bool) -> Array:
        """`decode.read` with parameters and cache."""
        own = self.model, self.params, self._cache
        logits_BV, self._cache = self._run(decode.read, *own, *work, from_start=from_start)
        return logits_BV

    def _make(self, newest_B, lengths_B, settings, counts, left_B, count, enough) -> tuple[Sampled, int]:
        work = newest_B, lengths_B, settings, counts, left_B, np.int32(count), np.int32(enough)
        own = self.model, self.params, self._cache
        sampled, made, self._cache = self._run(decode.make, *own, *work, most=MOST_STEPS)
        return jax.device_get((sampled, made))

    def _settings_of(self, tasks: Sequence[Task], rows: int) -> decode.Settings:
        """Kept as long as the same tasks are in the same places."""
        known, settings = self._settings.get(rows, ([], None))
        if settings is not None and known == list(tasks):
            return settings
        # rows without a task must not keep the others from what is quickest for them
        idle = PLAIN if tasks and all(_draws_from_all(task) for task in tasks) else GREEDY
        configs, biases, tops, adapters = [idle] * rows, [()] * rows, [0] * rows, [-1] * rows
        rows_B, ends_BE = np.full(rows, self.rows, np.int32), np.full((rows, ENDS), -1, np.int32)
        for place, task in zip(self.places(tasks, rows), tasks, strict=True):
            request, ends = task.answer.request, task.answer.ends[:ENDS]
            configs[place], biases[place], tops[place] = request.sampling, request.logit_bias, request.top_logprobs
            adapters[place] = self._adapters[request.adapter]
            rows_B[place], ends_BE[place, : len(ends)] = task.row.number, ends
        values = SamplingValues.of(configs, biases, tops)
        settings = self._put(decode.Settings(rows_B, values, ends_BE, np.array(adapters, np.int32)))
        self._settings[rows] = list(tasks), settings
        return settings

    def _counts_of(self, tasks: Sequence[Task], rows: int) -> Counts:
        """Of the rows with a penalty; made anew for each call, which makes several tokens."""
        if not any(_is_penalized(task) for task in tasks):
            return self._unused(rows)[0]
        vocab_size = self.model.config.vocab_size
        counts = Counts(np.zeros((rows, vocab_size), bool), np.zeros((rows, vocab_size), np.int32))
        for place, task in zip(self.places(tasks, rows), tasks, strict=True):
            if _is_penalized(task):
                prompt, answer = np.split(np.array(task.ids), [task.answer.prompt_tokens])
                counts.prompt_BV[place, prompt] = True
                counts.answer_BV[place] = np.bincount(answer, minlength=vocab_size)
        return self._put(counts)

    def _unused(self, rows: int) -> tuple[Counts, Array]:
        """Counts and masks for rows without a penalty or constraint; they stay on the device."""
        if rows not in self._nothing:
            allowed_BW = np.full((rows, -(-self.model.config.vocab_size // 32)), 2**32 - 1, np.uint32)
            self._nothing[rows] = self._put((Counts.none(rows, self.model.config.vocab_size), allowed_BW))
        return self._nothing[rows]


def _is_penalized(task: Task) -> bool:
    own = task.answer.request.sampling
    return own.repetition_penalty != 1 or own.presence_penalty != 0 or own.frequency_penalty != 0


def _draws_from_all(task: Task) -> bool:
    own = task.answer.request.sampling
    return own.temperature > 0 and not own.top_k and own.top_p == 1 and not own.min_p


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that the parameters are cut over; None where they lie on one device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.num_devices > 1 else None


def _without_fsdp(leaf: Array, whole: NamedSharding) -> NamedSharding:
    """Where an array lies in generation; `whole` if it is cut over no mesh yet, as adapters of a file are not."""
    own = leaf.sharding
    if not isinstance(own, NamedSharding):
        return whole
    return NamedSharding(own.mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in own.spec)))
