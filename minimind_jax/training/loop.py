"""The one training loop. A stage gives it a source of batches, a loss and parameters; it trains, watches, saves and
resumes.

Order of events at a step: its metrics, then the checkpoint, then the evaluation, then the samples. A run that is cut
off between two of them does the rest when it is resumed, so its metrics are those of a run that was not.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from minimind_jax import huge_pages
from minimind_jax.agreement import check_agreement, ending_alone
from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.sharding import data_process, shard_batch
from minimind_jax.training.checkpoint import Checkpoints
from minimind_jax.training.defaults import of_much, with_values
from minimind_jax.training.facts import few_steps, run_facts, schedule_change
from minimind_jax.training.journal import Journal, Step
from minimind_jax.training.profile import Profiler
from minimind_jax.training.progress import TrainingProgress
from minimind_jax.training.run import RunFolder, package_versions, plain
from minimind_jax.training.source import Recipe
from minimind_jax.training.speed import Speed
from minimind_jax.training.state import TrainState, create_state, fingerprint
from minimind_jax.training.step import Program, Skip, make_program
from minimind_jax.training.stop import StopRequest
from minimind_jax.training.tracking import MetricsWriter
from minimind_jax.training.watch import Timetable, Watch, check_patience, unwatched

SampleFn = Callable[[Params], list[tuple[str, str]]]


class TrainResult(NamedTuple):
    """params: all of them, on the mesh. step: optimizer steps done. model_step: the step that the parameters are of."""

    params: Params
    step: int
    model_step: int


def train(
    config: RunConfig,
    recipe: Recipe,
    *,
    stage: str,
    model: LanguageModel,
    run: RunFolder,
    mesh: Mesh,
    has_words: bool = True,
    sample_fn: SampleFn | None = None,
) -> TrainResult:
    """Trains for the steps that the recipe's source plans, going on from the run's newest checkpoint.

    has_words: false of a model with a head of scores. sample_fn: (prompt, text) pairs written by the model with these
    parameters.

    Writes metrics.jsonl, environment.json, config.yaml and checkpoints into the run's folder.
    Raises:
        UserError: the checkpoint is of another model or other data, the loss is not finite, the disk is full, ...
        Interrupted: SIGTERM, SIGHUP or Ctrl-C; the state is saved.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(recipe.source))
        config, stride = with_values(config, of_much(config)), recipe.source.stride
        check_patience(config.training, recipe.evaluation is not None)
        total_steps = recipe.source.planned_steps(config.training)
        check_agreement({"the number of steps": total_steps})
        watch = Watch(config.training.watch)
        skip = Skip(recipe.skip_above, stride) if recipe.skip_above else None
        program = make_program(config, recipe.parameters, recipe.loss_fn, mesh, total_steps, skip)
        facts = run_facts(config, recipe, stage, model, mesh, program.parts, total_steps, has_words)
        timetable = Timetable(config, total_steps, stride)
        is_first = jax.process_index() == 0
        stack.enter_context(ending_alone())
        stop = stack.enter_context(StopRequest())  # the last to go: a second signal must not disturb a save
        best = watch.best if config.checkpoint.keep_best or config.training.patience else None
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=config.checkpoint.keep, best=best))
        start = find_start(config, recipe, run, checkpoints, program, total_steps)
        # Before the settings: while metrics.jsonl says that the model is written, they are those it was written with.
        writer = stack.enter_context(
            MetricsWriter(run, config.tracking, start_step=start.step, settings=plain(config), active=is_first)
        )
        if is_first:
            run.write_config(config)
            run.write_environment(facts)
        watch.add_rows(writer.rows)
        progress = stack.enter_context(TrainingProgress(stage, total_steps, start.step, config.unit, active=is_first))
        profiler = stack.enter_context(Profiler(run, config.training, start.step, progress.say, active=is_first))
        resumed = {"resumed": f"from the checkpoint of step {start.step}"} if start.step else {}
        progress.facts({**facts, "run": str(run.path), **resumed})
        silent = unwatched(config.training, recipe.evaluation is not None)
        for warning in filter(None, [*start.warnings, few_steps(total_steps, config), silent]):
            progress.say(f"[bold red]warning:[/] {warning}")
        speed = Speed(model, config, start.record.get("seconds", 0.0), has_words, recipe.flops_beside)
        journal = Journal(config, timetable, writer, progress, speed, start.record, checkpoints, skip)
        loop = Loop(
            config, recipe, mesh, program, sample_fn, timetable, checkpoints, watch, journal, profiler, stop, start.base
        )  # fmt: skip
        state, step = loop.run(start.state, start.step)
        checkpoints.tidy()
        state, model_step = loop.best(state, step)
        if stop.signal is not None:  # it came after the last step; the same command writes the model
            loop.say_stopped(step)
            raise stop.exit()
    return TrainResult(state.all_params(), step, model_step)


class Start(NamedTuple):
    """Where a run begins or goes on."""

    step: int  # of the checkpoint, or 0
    record: dict[str, Any]  # the checkpoint's (see `Loop.save`), or {}
    state: TrainState
    base: str  # fingerprint of the frozen parameters
    warnings: list[str | None]  # of what has changed, to be shown


def find_start(
    config: RunConfig, recipe: Recipe, run: RunFolder, checkpoints: Checkpoints, program: Program, total_steps: int
) -> Start:
    """Loads the newest checkpoint, or makes the state of a run's first step. Raises UserError when the run is beyond
    its end, and for a checkpoint of other data, another model or another start."""
    step = checkpoints.newest()
    if step > total_steps:
        raise UserError(
            f"{run.path} is at step {step} already, beyond the {total_steps} steps asked for; ask for more, or choose "
            "another run name"
        )
    parameters, record, warnings = recipe.parameters, {}, []
    if step:
        record = checkpoints.record(step)
        planned = record.get("total_steps", total_steps)
        warnings.append(recipe.source.check_record(record["data"]))
        warnings.append(schedule_change(config.optimizer, step, planned, total_steps))
        state = checkpoints.restore(step, program.abstract.stored())
        frozen = parameters.split(parameters.load())[1] if program.abstract.frozen else {}
    else:
        trained, frozen = parameters.split(parameters.load())
        state = create_state(trained, program.optimizer, program.shardings)
    base = fingerprint(frozen)
    if record.get("base", base) != base:
        raise UserError(
            f"the model that {run.path} started from has changed since the checkpoint of step {step}, and its weights "
            "are part of what is trained (so is their dtype: compute.dtype, lora.base_dtype); restore it, or start "
            "another run"
        )
    held = None if program.abstract.held is None else 0 * state.step
    return Start(step, record, state._replace(frozen=frozen, held=held), base, warnings)


@dataclasses.dataclass
class Loop:
    """The parts of one run, and what happens at its steps. Made by `train`. base: see `Start`."""

    config: RunConfig
    recipe: Recipe
    mesh: Mesh
    program: Program
    sample_fn: SampleFn | None
    timetable: Timetable
    checkpoints: Checkpoints
    watch: Watch
    journal: Journal
    profiler: Profiler
    stop: StopRequest
    base: str

    def __post_init__(self):
        self.row_processes = data_process(self.mesh)[1]

    def run(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """From `step`, whose state this is, to the end, or until patience is lost. Returns where it has come to."""
        self.observe(state, step)
        source, total_steps, patience = self.recipe.source, self.timetable.total_steps, self.config.training.patience
        first = step
        source.begin(step, total_steps, self.is_stopping)
        while step < total_steps and not 0 < patience <= self.watch.since_best():
            if step % source.stride == 0:
                self.stop_if_asked(state, step)
            state, step = self.train_step(state, step), step + 1
            if step == first + 1:
                jax.block_until_ready(state.step)
            if step == first + 1 or huge_pages.is_short():
                huge_pages.give_back()
            self.checkpoints.poll()
            if self.timetable.saves(step):
                self.save(state, step)
            self.observe(state, step)
        self.stop_if_asked(state, step)
        return state, step

    def is_stopping(self) -> bool:
        return self.stop.signal is not None

    def train_step(self, state: TrainState, step: int) -> TrainState:
        """The state after one more step, which the device may still be doing."""
        made = self.recipe.source.next(step, state.all_params())
        if made is None:
            self.stop.agree()
            self.stop_if_asked(state, step)
        batch, told = made
        # Rows of other processes are as full as ours, nearly: asking them would cost a message a step.
        size = self.journal.speed.size_of(batch) * self.row_processes
        state, metrics = self.profiler.step(step + 1, self.program.step, state, shard_batch(batch, self.mesh))
        self.journal.follow(Step(step + 1, metrics, told, size))
        return state

    def save(self, state: TrainState, step: int) -> None:
        with self.journal.caught_up():
            record = {
                **self.journal.record(),
                "data": self.recipe.source.record(),
                "base": self.base,
                "total_steps": self.timetable.total_steps,
                "config": plain(self.config),
                "versions": package_versions(),
            }
            self.journal.writer.sync()  # the metrics up to a checkpoint are there when it is
            self.checkpoints.save(step, state.stored(), record)

    def stop_if_asked(self, state: TrainState, step: int) -> None:
        if not self.stop.should_stop(step // self.recipe.source.stride):
            return
        if step:  # there is nothing to lose before the first step
            self.save(state, step)
            self.checkpoints.wait()
        self.say_stopped(step)
        raise self.stop.exit()

    def say_stopped(self, step: int) -> None:
        self.journal.progress.say(
            f"{self.stop.signal.name}: stopped at step {step} of {self.timetable.total_steps} with everything saved; "
            "run the same command again to go on"
        )

    def observe(self, state: TrainState, step: int) -> None:
        """The evaluation and the samples due at `step`, unless they were written before the run was cut off."""
        is_written, has_validation = self.journal.writer.has, self.recipe.evaluation is not None
        if has_validation and self.timetable.evaluates(step) and not is_written(step, self.watch.key):
            with self.journal.caught_up():
                self.evaluate(state.all_params(), step)
        if self.sample_fn is not None and self.timetable.samples(step) and not is_written(step, "samples"):
            with self.journal.caught_up():
                self.sample(state.all_params(), step)

    def evaluate(self, params: Params, step: int) -> None:
        """Writes the evaluation's numbers as val_NAME; left out when the run is asked to stop meanwhile."""
        found = self.recipe.evaluation(params, self.is_stopping)
        if found is None:
            return
        self.watch.add(step, found)
        self.journal.writer.write(step, **{f"val_{name}": value for name, value in found.items()})
        numbers = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
        self.journal.progress.say(f"validation at step {step}: {numbers}")

    def sample(self, params: Params, step: int) -> None:
        samples = [{"prompt": prompt, "text": text} for prompt, text in self.sample_fn(params)]
        self.journal.writer.write(step, samples=samples)
        self.journal.progress.say(f"samples at step {step}:")
        for sample in samples:
            self.journal.progress.say(f"  {sample['prompt']!r} -> {sample['text']!r}", plain=True)

    def best(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """The state that the run's model is of, and its step: the last, or with patience the best that is kept."""
        best = self.watch.best(self.checkpoints.steps) if self.config.training.patience else None
        if best is not None:
            self.journal.progress.say(f"the model is that of step {best}, whose {self.watch.told()}")
        if best in (None, step):
            return state, step
        frozen = state.frozen
        for array in jax.tree.leaves(state.stored()):  # there may be no room for two
            array.delete()
        return self.checkpoints.restore(best, self.program.abstract.stored())._replace(frozen=frozen), best
