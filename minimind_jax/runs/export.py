"""A checkpoint of a run, finished or cut off, as a model and as a Hugging Face folder."""

import dataclasses
from collections.abc import Container
from typing import Any, NamedTuple

from minimind_jax.config import settings
from minimind_jax.config.rl import CRITIC
from minimind_jax.config.sections import MeshConfig
from minimind_jax.config.stages import RunConfig
from minimind_jax.config.tools import ToGGUFConfig, ToHFConfig
from minimind_jax.convert.hf import Labels, save_hf, stored_dtype
from minimind_jax.convert.load import folders_of, from_hf, load_generation_settings, merge_lora
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter, resolve_model_folder, resolve_run
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import join, merge
from minimind_jax.model.transformer import Params
from minimind_jax.paths import as_path
from minimind_jax.runs.kind import StageKind, Stages
from minimind_jax.runs.labels import labels_of_run
from minimind_jax.runs.parts import assemble, run_parameters
from minimind_jax.runs.vision import TOWER
from minimind_jax.sharding import announce, make_mesh
from minimind_jax.shell import needing
from minimind_jax.training.checkpoint import DamagedCheckpoint, load_params
from minimind_jax.training.origin import check_words, find_models
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import read_metrics
from minimind_jax.training.watch import Watch


def export(stages: Stages, config: ToHFConfig) -> None:
    """`minimind convert to-hf`: a checkpoint, or the model of a run or a folder, whose adapters are merged."""
    if config.checkpoint:
        step = export_checkpoint(stages, config)
        print(f"wrote {config.output}, step {step} of {config.source}")
        return
    source, dtype = resolve_model_folder(config.source, "source"), config.dtype or "bfloat16"
    convert = merge_lora if is_adapter(source) else from_hf
    convert(source, config.output, dtype=dtype, max_shard_bytes=config.max_shard_bytes)
    found = stored_dtype(folders_of(source)[-1])
    is_rounded = not config.dtype and found == "float32"
    note = " in bfloat16 (--dtype float32 keeps the precision of the source)" * is_rounded
    print(f"wrote {config.output}{note}")


def export_gguf(stages: Stages, config: ToGGUFConfig) -> None:
    """`minimind convert to-gguf`: a checkpoint, the model of a run or a folder, or an adapter alone."""
    with needing("GGUF files need another package", "gguf"):
        from minimind_jax.convert import gguf
    if config.checkpoint:
        found = load_checkpoint(stages, config)
        written = gguf.params_to_gguf(
            config.output, as_path(config.source).name, found.config, found.params, found.tokenizer,
            config.dtype or found.dtype, found.generation, config.text_only,
        )  # fmt: skip
    else:
        source = resolve_model_folder(config.source, "source")
        if config.adapter:
            written = gguf.adapter_to_gguf(source, config.output, config.dtype, config.base)
        else:
            written = gguf.to_gguf(source, config.output, config.dtype, config.base, config.text_only)
    for note in written.notes:
        announce(f"note: {note}")
    print("\n".join(f"wrote {file}" for file in written.files))


class Checkpoint(NamedTuple):
    """A checkpoint as a whole model: adapters merged into the model that they were trained over."""

    step: int
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    labels: Labels | None  # of a model with a head of scores
    generation: dict[str, Any] | None  # what its generation_config.json has
    dtype: str  # the run's export_dtype


def export_checkpoint(stages: Stages, asked: ToHFConfig) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder and returns its step (see `load_checkpoint`)."""
    found = load_checkpoint(stages, asked)
    save_hf(
        asked.output, found.config, found.params, found.tokenizer,
        dtype=asked.dtype or found.dtype, max_shard_bytes=asked.max_shard_bytes, labels=found.labels,
        generation_config=found.generation,
    )  # fmt: skip
    return found.step


def load_checkpoint(stages: Stages, asked: ToHFConfig | ToGGUFConfig) -> Checkpoint:
    """A checkpoint of a run, adapters merged into the model that they were trained over. Nothing in the run's folder is
    changed, so the run may be under way. Raises UserError when there is no such run or checkpoint, when the tokenizer
    or model that the run started from is gone, and when the tokenizer has other words by now."""
    folder = _find_run(asked.source)
    kind, config = _read_settings(stages, folder)
    then = folder.then()
    places = {key: then.current(getattr(config, key)) for key in ("init_from", "tokenizer")} if then else {}
    config = dataclasses.replace(config, mesh=MeshConfig(), **places)  # of this machine, not those of the training
    models = find_models(config, ["init_from", TOWER])
    run = assemble(kind, config, folder, make_mesh(config.mesh), models)
    if labels := labels_of_run(kind, folder):
        run = run.with_labels(labels)
    check_words(folder, run.tokenizer)
    parameters = run_parameters(run)
    trained, frozen = parameters.split(parameters.abstract)
    step, params = _load_sound(folder, asked.checkpoint, trained)
    if frozen:
        params = merge(join(parameters.split(parameters.load())[1], params))
    generation = run.start and load_generation_settings(run.start)
    return Checkpoint(step, run.model.config, params, run.tokenizer, run.labels, generation, config.export_dtype)


def _load_sound(run: RunFolder, checkpoint: str, abstract: Any) -> tuple[int, Any]:
    """The step that `checkpoint` means and its model's parameters; damaged ones are told, and passed over unless
    named."""
    damaged: set[int] = set()
    while True:
        step = choose_step(run, checkpoint, damaged)
        try:
            return step, load_params(run.checkpoints / str(step), abstract, beside=(CRITIC,))
        except DamagedCheckpoint as error:
            damaged.add(step)
            if checkpoint not in ("newest", "best"):
                raise
            if damaged >= set(run.checkpoint_steps()):
                raise UserError(f"{error.problem}, and there is no other; start another run") from error
            announce(f"warning: {error.problem}; the next one is taken")


def choose_step(run: RunFolder, checkpoint: str, damaged: Container[int] = ()) -> int:
    """The step of the checkpoint, of those that are not `damaged`, that `newest`, `best` (the evaluation that the run
    watches is best) or a number means. Raises UserError if there is none."""
    steps = [step for step in run.checkpoint_steps() if step not in damaged]
    if not steps:
        raise UserError(f"{run.checkpoints} holds no checkpoint; run it again until it has saved one")
    if checkpoint == "newest":
        return steps[-1]
    there = f"{run.checkpoints} holds those of the steps {', '.join(map(str, steps))}"
    if checkpoint == "best":
        watch = Watch.of_run(run.read_config(), read_metrics(run.metrics_file))
        if (best := watch.best(steps)) is None:
            raise UserError(f"no checkpoint was saved at a step with a validation {watch.name}; {there}")
        return best
    if int(checkpoint) not in steps:
        raise UserError(f"there is no checkpoint of step {checkpoint}; {there}")
    return int(checkpoint)


def _find_run(name: str) -> RunFolder:
    runs = [RunFolder(place) for place in dict.fromkeys([resolve_run(name), as_path(name).expanduser()])]
    for run in runs:
        if run.config_file.is_file():
            return run
    looked = ", ".join(str(run.config_file) for run in runs)
    raise UserError(f"source {name!r} is not a run (no {looked}), and only runs have checkpoints")


def _read_settings(stages: Stages, run: RunFolder) -> tuple[StageKind, RunConfig]:
    stage = run.read_environment().get("run", {}).get("stage")
    if stage not in stages:
        raise UserError(
            f"{run.environment_file} should name the run's stage ({', '.join(stages)}), and says {stage}; run it again "
            "with this version"
        )
    return stages[stage], settings.make_settings(stages[stage].config, settings.read_yaml(run.config_file))
