"""The one training loop. A stage gives it a source of batches, a loss and parameters; it trains, watches, saves and
resumes.

Order of events at a step: its metrics, then the checkpoint, then the evaluation, then the samples. A run that is cut
off between two of them does the rest when it is resumed, so its metrics are those of a run that was not.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from minimind_jax import STARTED
from minimind_jax.agreement import check_agreement, ending_alone
from minimind_jax.config.stages import RunConfig
from minimind_jax.errors import UserError
from minimind_jax.losses import LossFn
from minimind_jax.model.heads import SCORE
from minimind_jax.model.transformer import LanguageModel, Params
from minimind_jax.sharding import data_process, make_mesh, shard_batch
from minimind_jax.training.checkpoint import Checkpoints
from minimind_jax.training.defaults import filled
from minimind_jax.training.facts import check_patience, few_steps, run_facts, schedule_change
from minimind_jax.training.profile import Profiler
from minimind_jax.training.program import Program, make_program
from minimind_jax.training.progress import TrainingProgress
from minimind_jax.training.run import RunFolder, package_versions, plain
from minimind_jax.training.source import Evaluation, Source
from minimind_jax.training.speed import Speed
from minimind_jax.training.state import Parameters, TrainState, create_state, fingerprint
from minimind_jax.training.step import TrainStep
from minimind_jax.training.stop import StopRequest
from minimind_jax.training.tracking import MetricsWriter, val_losses

MOST_SKIPPED = 10  # skipped updates from which on a run stops where they are the most

SampleFn = Callable[[Params], list[tuple[str, str]]]


class TrainResult(NamedTuple):
    """params: all of them, on the mesh. step: optimizer steps done. val_loss: at the end, None without validation.
    model_step: the step that the parameters are of."""

    params: Params
    step: int
    val_loss: float | None
    model_step: int


def train(
    config: RunConfig,
    *,
    stage: str,
    model: LanguageModel,
    parameters: Parameters,
    loss_fn: LossFn,
    source: Source,
    evaluation: Evaluation | None,
    run: RunFolder,
    sample_fn: SampleFn | None = None,
) -> TrainResult:
    """Trains for the steps that `config.training` plans, going on from the run's newest checkpoint.

    parameters: what is trained, and what `loss_fn` (see `losses`) reads beside it. source: of the batches. evaluation:
    at `training.eval_every`. sample_fn: (prompt, text) pairs written by the model with these parameters.

    Writes metrics.jsonl, environment.json, config.yaml and checkpoints into the run's folder.
    Raises:
        UserError: the checkpoint is of another model or other data, the loss is not finite, the disk is full, ...
        Interrupted: SIGTERM, SIGHUP or Ctrl-C; the state is saved.
    """
    config = filled(config)
    run.check_resume(config.resume)
    check_patience(config.training, evaluation is not None)
    mesh = make_mesh(config.mesh)
    total_steps = source.planned_steps(config.training)
    check_agreement({"the number of steps": total_steps})
    program = make_program(config, parameters, loss_fn, mesh, total_steps)
    is_first = jax.process_index() == 0
    losses: dict[int, float] = {}  # step -> validation loss, as far as known
    with ending_alone(), contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())  # the last to go: a second signal must not disturb a save
        checkpoints = stack.enter_context(
            Checkpoints(
                run.checkpoints,
                keep=config.checkpoint.keep,
                val_losses=losses if config.checkpoint.keep_best or config.training.patience else None,
            )
        )
        start_step = checkpoints.newest()
        if start_step > total_steps:
            raise UserError(
                f"{run.path} is at step {start_step} already, beyond the {total_steps} steps asked for; ask for "
                "more, or choose another run name"
            )
        record = checkpoints.record(start_step) if start_step else {}
        warnings = []
        if record:
            warnings.append(source.check_record(record["data"]))
            warnings.append(
                schedule_change(config.optimizer, start_step, record.get("total_steps", total_steps), total_steps)
            )
        state = start_state(parameters, program, checkpoints, start_step)
        base = fingerprint(state.frozen)
        if record.get("base", base) != base:
            raise UserError(
                f"the model that {run.path} started from has changed since the checkpoint of step {start_step}, and "
                "its weights are part of what is trained (so is their dtype: compute.dtype, lora.base_dtype); restore "
                "it, or start another run"
            )

        has_words = SCORE not in parameters.abstract
        facts = run_facts(config, stage, model, mesh, program.parts, source, evaluation, total_steps, has_words)
        # Before the settings: while metrics.jsonl says that the model is written, they are those it was written with.
        writer = stack.enter_context(
            MetricsWriter(run, config.tracking, start_step=start_step, settings=plain(config), active=is_first)
        )
        if is_first:
            run.write_config(config)
            run.write_environment(facts)
        losses.update(val_losses(writer.rows))
        progress = stack.enter_context(TrainingProgress(stage, total_steps, start_step, active=is_first))
        profiler = Profiler(run, config.training, start_step, progress.say, active=is_first)
        loop = Loop(
            config=config,
            mesh=mesh,
            train_step=program.step,
            source=source,
            evaluation=evaluation,
            sample_fn=sample_fn,
            total_steps=total_steps,
            checkpoints=checkpoints,
            writer=writer,
            losses=losses,
            progress=progress,
            profiler=stack.enter_context(profiler),
            stop=stop,
            speed=Speed(model, config.data.seq_len, record.get("seconds", 0.0), has_words),
            tokens=record.get("tokens", 0),
            skipped=record.get("skipped", 0),
            base=base,
        )
        resumed = {"resumed": f"from the checkpoint of step {start_step}"} if start_step else {}
        loop.progress.facts({**facts, "run": str(run.path), **resumed})
        for warning in filter(None, [*warnings, few_steps(total_steps, config)]):
            loop.progress.say(f"[bold red]warning:[/] {warning}")
        state = loop.run(state, start_step)
        checkpoints.wait()
        step = model_step = int(state.step)
        if config.training.patience and (known := losses.keys() & set(checkpoints.steps)):
            model_step = min(known, key=lambda step: (losses[step], step))
            loop.progress.say(f"the model is that of step {model_step}, whose validation loss is the lowest")
            state = checkpoints.restore(model_step, program.abstract._replace(frozen={}))._replace(frozen=state.frozen)
        if stop.signal is not None:  # it came after the last step; the same command writes the model
            loop.say_stopped(step)
            raise stop.exit()
    return TrainResult(state.all_params(), step, losses[max(losses)] if losses else None, model_step)


def start_state(parameters: Parameters, program: Program, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state of the checkpoint `step`, or of a run's start when it is 0."""
    if not step:
        trained, frozen = parameters.split(parameters.load())
        return create_state(trained, program.optimizer, program.shardings, frozen)
    state = checkpoints.restore(step, program.abstract._replace(frozen={}))
    return state._replace(frozen=parameters.split(parameters.load())[1] if program.abstract.frozen else {})


class Unread(NamedTuple):
    """A step under way: its metrics on the device, what the source told of it, and the tokens of its batch."""

    step: int
    metrics: dict[str, jax.Array]
    told: Mapping[str, float]
    tokens: int


@dataclasses.dataclass
class Loop:
    """The parts of one run, and what happens at its steps. Made by `train`.

    losses: step -> validation loss; shared with `checkpoints`. tokens: trained so far.
    skipped: updates that were not made. base: fingerprint of the frozen parameters.
    """

    config: RunConfig
    mesh: Mesh
    train_step: TrainStep
    source: Source
    evaluation: Evaluation | None
    sample_fn: SampleFn | None
    total_steps: int
    checkpoints: Checkpoints
    writer: MetricsWriter
    losses: dict[int, float]
    progress: TrainingProgress
    profiler: Profiler
    stop: StopRequest
    speed: Speed
    tokens: int
    skipped: int
    base: str

    def __post_init__(self):
        self.training, self.checkpoint = self.config.training, self.config.checkpoint

    def run(self, state: TrainState, start_step: int) -> TrainState:
        """From `start_step`, whose state this is, to the end, or until patience is lost."""
        self.observe(state, start_step)
        if self.has_lost_patience():
            return state
        unread: Unread | None = None
        _, row_processes = data_process(self.mesh)
        with contextlib.closing(self.source):
            self.source.begin(start_step, self.total_steps)
            for step in range(start_step + 1, self.total_steps + 1):
                if (step - 1) % self.source.stride == 0:
                    self.stop_if_asked(state, step - 1, unread)
                batch, told = self.source.next(step - 1, state.all_params())
                state, metrics = self.profiler.step(step, self.train_step, state, shard_batch(batch, self.mesh))
                # Step N is under way before the metrics of N - 1 are read: the device never waits for the host.
                self.read(unread)
                # Rows of other processes are as full as ours, nearly: asking them would cost a message a step.
                unread = Unread(step, metrics, told, int(np.count_nonzero(batch["segment_ids"])) * row_processes)
                self.checkpoints.poll()
                is_saved = self.is_due(step, self.checkpoint.every) or (
                    self.training.patience > 0 and self.is_due(step, self.training.eval_every)
                )
                if is_saved or self.is_watched(step):
                    self.read(unread)
                    unread = None
                    if is_saved:
                        self.save(state, step)
                    self.observe(state, step)
                    if self.has_lost_patience():
                        break
        self.stop_if_asked(state, int(state.step), unread)
        return state

    def has_lost_patience(self) -> bool:
        """Whether `training.patience` evaluations in a row were no better than the best before them."""
        ordered = [self.losses[step] for step in sorted(self.losses) if step]  # the start is no result
        since_best = len(ordered) - 1 - ordered.index(min(ordered)) if ordered else 0
        return 0 < self.training.patience <= since_best

    def is_due(self, step: int, every: int) -> bool:
        """Whether what is done `every` steps is to be done after `step`; what falls into a stride waits for its end."""
        stride = self.source.stride
        is_reached = every > 0 and step % stride == 0 and step // every > (step - stride) // every
        return is_reached or step == self.total_steps

    def is_watched(self, step: int) -> bool:
        """Whether a step ends in an evaluation or in samples."""
        return self.is_due(step, self.training.eval_every) or self.has_samples(step)

    def has_samples(self, step: int) -> bool:
        return self.sample_fn is not None and self.is_due(step, self.training.sample_every)

    def read(self, unread: Unread | None) -> None:
        """Waits for a step's metrics; logs them, and stops the run when they are not finite."""
        if unread is None:
            return
        step, metrics, told, batch_tokens = unread
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not self.speed.has_begun:
            seconds = time.perf_counter() - STARTED
            self.progress.say(f"step {step}, the first here, was done {seconds:.1f} s after the program started")
        if not metrics.pop("finite"):
            self.skip(step, metrics)
        self.tokens += round(metrics.pop("tokens"))
        self.speed.add(batch_tokens)
        row = {**metrics, "tokens": self.tokens, **told} | ({"skipped": self.skipped} if self.skipped else {})
        is_logged = step == 1 or step == self.total_steps or step % self.training.log_every == 0
        if is_logged:
            row |= self.speed.read()
        self.writer.write(step, is_logged or bool(told), **(row if is_logged else {"loss": row["loss"], **told}))
        self.progress.update(step, row | self.speed.forecast(self.total_steps - step), log=is_logged)

    def skip(self, step: int, metrics: dict) -> None:
        """Counts an update that was not made, and says so; stops the run when most of them were not."""
        if self.training.stop_on_nan:
            raise self.not_finite(step, metrics)
        self.skipped += 1
        told = f"{self.skipped:,} of {step:,} updates were skipped so far: the loss or the gradient was not finite"
        if 2 * self.skipped > step and (self.skipped >= MOST_SKIPPED or step == self.total_steps):
            raise UserError(
                f"{told}. Most of them were, so the run has stopped and keeps its older checkpoints. {self.way_out()}"
            )
        if self.skipped & (self.skipped - 1) == 0:  # the first, and then ever more rarely
            self.progress.say(f"[bold red]warning:[/] {told}")

    def not_finite(self, step: int, metrics: dict) -> UserError:
        kept = self.checkpoints.steps
        return UserError(
            f"step {step}: the loss ({metrics['loss']}) or the gradient norm ({metrics['grad_norm']}) is not finite; "
            f"the run has stopped; {f'checkpoint {kept[-1]} is kept' if kept else 'there is no checkpoint yet'}. "
            f"{self.way_out()}; training.stop_on_nan false skips such steps instead"
        )

    def way_out(self) -> str:
        return (
            f"Try a lower optimizer.learning_rate (now {self.config.optimizer.learning_rate:g}), more "
            "optimizer.warmup_fraction, training.max_grad_norm 1, or compute.dtype float32, then run the same command "
            "again to go on from the checkpoint"
        )

    def save(self, state: TrainState, step: int) -> None:
        record = {
            "data": self.source.record(),
            "base": self.base,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "total_steps": self.total_steps,
            "seconds": self.speed.seconds(),
            "config": plain(self.config),
            "versions": package_versions(),
        }
        with self.speed.pause():
            self.writer.sync()  # the metrics up to a checkpoint are there when it is
            self.checkpoints.save(step, state._replace(frozen={}), record)

    def stop_if_asked(self, state: TrainState, step: int, unread: Unread | None) -> None:
        if not self.stop.should_stop(step):
            return
        self.read(unread)
        if step:  # there is nothing to lose before the first step
            self.save(state, step)
            self.checkpoints.wait()
        self.say_stopped(step)
        raise self.stop.exit()

    def say_stopped(self, step: int) -> None:
        self.progress.say(
            f"{self.stop.signal.name}: stopped at step {step} of {self.total_steps} with everything saved; run the "
            "same command again to go on"
        )

    def observe(self, state: TrainState, step: int) -> None:
        """The evaluation and the samples due at `step`, unless they were written before the run was cut off."""
        with self.speed.pause():
            if self.evaluation is not None and self.is_due(step, self.training.eval_every):
                if not self.writer.has(step, "val_loss"):
                    self.evaluate(state.all_params(), step)
            if self.has_samples(step) and not self.writer.has(step, "samples"):
                self.sample(state.all_params(), step)

    def evaluate(self, params: Params, step: int) -> None:
        """Writes the evaluation's numbers as val_NAME; left out when the run is asked to stop meanwhile."""
        found = self.evaluation(params, lambda: self.stop.signal is not None)
        if found is None:
            return
        self.writer.write(step, **{f"val_{name}": value for name, value in found.items()})
        self.losses[step] = found["loss"]
        numbers = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
        self.progress.say(f"validation at step {step}: {numbers}")

    def sample(self, params: Params, step: int) -> None:
        samples = [{"prompt": prompt, "text": text} for prompt, text in self.sample_fn(params)]
        self.writer.write(step, samples=samples)
        self.progress.say(f"samples at step {step}:")
        for sample in samples:
            self.progress.say(f"  {sample['prompt']!r} -> {sample['text']!r}", plain=True)
