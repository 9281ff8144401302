"""Stage: learning from pairs of answers, chosen and rejected (DPO and its relatives)."""

import io
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from minimind_jax.config.stages import DPOConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.documents import encode_prompt
from minimind_jax.data.open import open_data
from minimind_jax.data.rows import Pieces
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.losses.preference import REFERENCE, answer_log_probs, make_preference_loss, without_reference
from minimind_jax.losses.sequences import pair_room
from minimind_jax.model.lora import TRAINED, join, split, without_adapters
from minimind_jax.model.transformer import LanguageModel, Params, full_precision
from minimind_jax.paths import is_remote
from minimind_jax.progress import tracked
from minimind_jax.runs.adapters import plan_adapters
from minimind_jax.runs.begin import is_finished, start_run, tidy
from minimind_jax.runs.finish import finish_run
from minimind_jax.runs.models import build_model, check_context, load_tokenizer, run_parameters, say_if_endless
from minimind_jax.runs.samples import sampler, with_prompts
from minimind_jax.runs.settle import settle
from minimind_jax.sharding import announce, data_process, make_mesh, shard_batch
from minimind_jax.shell import command
from minimind_jax.training.packed import train_on_rows
from minimind_jax.training.run import RunFolder
from minimind_jax.training.state import Parameters, fingerprint


@tidy
def dpo(config: DPOConfig) -> Path:
    """Trains a model to prefer the chosen answers of `config.data` and returns the run's folder.

    Data: records with `chosen` and `rejected` conversations, both answers of a pair in one row. Loss: that of
    `config.preference` (see `losses.preference`), relative to the model as it was at the start. Trained: all
    parameters, or adapters; these need no second model, for the reference is the model without them. Written: the run's
    folder (see `training.run`). A run that was cut off goes on; a finished one returns at once.

    Raises:
        UserError: anything in the settings, the data or the machine that the user can mend.
        Interrupted: the run was asked to stop and has saved its state.
    """
    run = start_run(config)
    if is_finished(run, config):
        return run.path
    if not config.init_from:
        raise UserError("dpo needs a model that can answer already: give --init_from")

    tokenizer = load_tokenizer(config)
    model = build_model(config, tokenizer)
    check_context(config, model)
    say_if_endless(tokenizer)
    config = settle(config, "preference", tokenizer, model, run)

    def encode(prompt: str) -> list[int]:
        return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])

    sample_fn = sampler(model, tokenizer, with_prompts(config, "preference"), config.seed, encode)
    wanted = config.preference
    parameters = run_parameters(config, model)
    mesh = make_mesh(config.mesh)
    annotate = reference = None
    if wanted.precompute_reference:
        annotate = Precomputed(config, model, parameters, tokenizer, run).annotate
    elif wanted.has_reference:
        reference = Reference(model, has_own=not _starts_as_the_base(config, model))
        parameters = reference.add_to(parameters)
    train_batches, val_batches = open_data("preference", config, tokenizer, *data_process(mesh), annotate=annotate)
    result = train_on_rows(
        config,
        stage="dpo",
        model=model,
        parameters=parameters,
        loss_fn=make_preference_loss(
            model,
            wanted.loss,
            beta=wanted.beta,
            label_smoothing=wanted.label_smoothing,
            gamma=wanted.gamma,
            sft_weight=float(wanted.loss == "orpo") if wanted.sft_weight is None else wanted.sft_weight,
            reference=reference,
        ),
        train_batches=train_batches,
        val_batches=val_batches,
        run=run,
        sample_fn=sample_fn and (lambda params: sample_fn(without_reference(params))),
    )
    result = result._replace(params=without_reference(result.params))
    hint = (
        f"  {command('chat', '--model', run.model)}\n  {command('generate', '--model', run.model, '--prompt', 'Hello')}"
    )
    return finish_run(run, config, model, tokenizer, result, hint)


def _starts_as_the_base(config: DPOConfig, model: LanguageModel) -> bool:
    """Whether the model's adapters are new ones, which change nothing at the start."""
    return model.adapter is not None and plan_adapters(config, model.config).stored is None


class Reference:
    """The policy as it was at the start: a function of all parameters (see `losses.preference`).

    has_own: whether there are parameters of its own among them, under REFERENCE: a copy of all, or of adapters that
    were trained before. If not, it is the model without its adapters.
    """

    def __init__(self, model: LanguageModel, has_own: bool):
        self.model, self.has_own = model, has_own
        self.base = LanguageModel(model.config, model.compute)

    def __call__(self, params: Params) -> tuple[LanguageModel, Params]:
        own, shared = params.get(REFERENCE, {}), without_reference(params)
        if not self.has_own:
            return self.base, without_adapters(shared)
        if self.model.adapter is None:
            return self.model, own
        return self.model, join(split(shared, lambda path: path[-1] not in TRAINED)[0], own)

    def add_to(self, parameters: Parameters) -> Parameters:
        """The parameters with those of the reference, which are never trained."""
        if not self.has_own:
            return parameters

        def copied(tree: Params) -> Params:
            return {**tree, REFERENCE: parameters.split(tree)[0]}

        def load() -> Params:
            params = parameters.load()
            return {**params, REFERENCE: jax.tree.map(lambda leaf: leaf.copy(), parameters.split(params)[0])}

        return Parameters(
            copied(parameters.abstract),
            copied(parameters.axes),
            load,
            lambda path: path[0] != REFERENCE and parameters.is_trained(path),
        )


class Precomputed:
    """The reference's log-probabilities of every pair, computed once and kept in the run's folder.

    Raises UserError when the file there cannot be written.
    """

    def __init__(
        self, config: DPOConfig, model: LanguageModel, parameters: Parameters, tokenizer: Tokenizer, run: RunFolder
    ):
        self.room = pair_room(config.data.seq_len)
        self.mesh = make_mesh(config.mesh)
        pair = open_data("preference", config, tokenizer, *data_process(self.mesh), annotate=self._numbers)
        caches = {batches.cache.folder.name: batches for batches in pair if batches is not None}
        file = run.path / "reference.npz"
        params = parameters.load()
        made_of = f"{fingerprint(params)}, rows of {config.data.seq_len}, {model.dtype}"
        self.tables = _read_tables(file, made_of, caches)
        if self.tables is None:
            count = sum(len(batches.cache) for batches in caches.values())
            announce(f"computing the reference's log-probabilities of {count:,} pairs")
            self.tables = {
                name: np.full((len(batches.cache), 2), np.nan, np.float32) for name, batches in caches.items()
            }
            for batches in filter(None, pair):
                self._fill(self.tables[batches.cache.folder.name], batches, model, params)
            if jax.process_index() == 0:
                _write_tables(file, made_of, self.tables)

    def annotate(self, cache, pieces: Pieces) -> dict[str, np.ndarray]:
        """reference_log_probs (rows, S) of rows whose pieces are the sides of pairs."""
        found = np.zeros((pieces.row_count, self.room), np.float32)
        sides = self.tables[cache.folder.name][pieces.documents, pieces.segments % 2]
        found[pieces.rows, pieces.segments] = sides
        return {"reference_log_probs": found}

    def _numbers(self, cache, pieces: Pieces) -> dict[str, np.ndarray]:
        found = np.full((pieces.row_count, self.room // 2), -1, np.int32)
        found[pieces.rows, pieces.segments // 2] = pieces.documents
        return {"documents": found}

    def _fill(self, table: np.ndarray, batches: Batches, model: LanguageModel, params: Params) -> None:
        @jax.jit
        def answers(params, batch):
            with full_precision(model.compute):
                found, _ = answer_log_probs(model, params, batch)
            return found.chosen, found.rejected

        is_first = jax.process_index() == 0
        for batch in tracked(batches.eval_batches(), "the reference", batches.eval_steps(), show=is_first):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                placed = shard_batch(batch, self.mesh)
                found = (placed.pop("documents"), *answers(params, placed))
            if jax.process_count() > 1:
                found = multihost_utils.process_allgather(found, tiled=True)
            documents, *sides = (np.asarray(array) for array in found)
            is_pair = documents >= 0
            table[documents[is_pair]] = np.stack([side[:, : documents.shape[1]][is_pair] for side in sides], axis=-1)


def _write_tables(file: Path, made_of: str, tables: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, made_of=made_of, **tables)
    partial = file if is_remote(file) else file.with_name(f".{file.name}.partial")  # objects appear whole
    try:
        partial.write_bytes(content.getvalue())
        if partial != file:
            partial.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}; make room and run again") from error


def _read_tables(file: Path, made_of: str, caches: dict[str, Batches]) -> dict[str, np.ndarray] | None:
    """The tables of a run that goes on; None where there are none of this model, these rows and these pairs."""
    if not file.is_file():
        return None
    try:
        stored = dict(np.load(io.BytesIO(file.read_bytes())))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):  # cut off
        return None
    if str(stored.pop("made_of", "")) != made_of or stored.keys() != caches.keys():
        return None
    return stored
