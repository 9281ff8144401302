"""The settings of a run that follow from its data (see `training.defaults`), found before its first step and told."""

import dataclasses

import jax

from minimind_jax.config.stages import RunConfig
from minimind_jax.data.batches import split_records
from minimind_jax.data.cache_folder import cache_root, file_identities
from minimind_jax.data.epoch import plan_epoch
from minimind_jax.data.jsonl import expand_paths
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.token_cache import build_cache
from minimind_jax.errors import UserError
from minimind_jax.model.lora import without_adapters
from minimind_jax.model.transformer import count_parameters
from minimind_jax.runs.parts import Run
from minimind_jax.sharding import announce, row_shards
from minimind_jax.training import defaults
from minimind_jax.training.run import RunFolder, flat, plain


def settle(run: Run) -> RunConfig:
    """The run's settings with a value for everything that they leave open; says which, and from how much data they
    follow.

    A run that goes on keeps the values it was started with. Raises UserError for what is wrong with the data.
    """
    asked, found = flat(plain(run.config)), {}
    values, is_packed = run.folder.settled(asked), bool(KINDS[run.kind.records].packings)
    if not is_packed:
        values.pop("training.batch_tokens", None)  # follows from other settings, anew where these change
    try:
        config = defaults.with_values(run.config, values)
    except ValueError as error:
        raise UserError(
            f"{run.folder.path} goes on with the values that it has, and these settings do not fit them ({error}); set "
            "them as they were, or choose another run name"
        ) from error
    size = sum(file.stat().st_size for file in expand_paths(config.data.train, config.of_pictures))
    chances = defaults.open_chances(config, KINDS[run.kind.records].rendered, size)
    config = defaults.with_values(config, chances)
    if is_packed and defaults.leaves_open(config):
        found, told = _from_data(dataclasses.replace(run, config=config))
        config = defaults.with_values(config, found)
        follow = ", ".join(f"{key} {value:g}" for key, value in (chances | found).items())
        announce(f"{told}. From that follow, unless you set them: {follow}")
    elif not is_packed:
        found = defaults.of_much(config)
        config = defaults.with_values(config, found)
    run.folder.asked = {key: asked[key] for key in values | chances | found}
    run.folder.content = content_of(config)
    if both := {*run.folder.content["data.train"]} & {*run.folder.content["data.val"]}:
        announce(f"warning: {len(both)} of the files of data.val are in data.train, too, and tell nothing new")
    return config


def content_of(config: RunConfig) -> dict[str, list[str]]:
    """Hashes of the files of data.train and data.val. Raises UserError for files that are not there."""

    def contents(paths: tuple[str, ...]) -> list[str]:
        files = expand_paths(paths, config.of_pictures)
        return [content for *_, content in file_identities(files, cache_root(data))]

    data = config.data
    return {"data.train": contents(data.train), "data.val": contents(data.val)}


def changed_data(run: RunFolder, config: RunConfig) -> list[str]:
    """A sentence about each of data.train and data.val whose content is not what the run was trained on."""
    before = run.read_environment().get("content", {})
    try:
        now = content_of(config)
    except UserError as error:
        return [str(error)]
    return [f"the content of {key}" for key in before if before[key] != now[key]]


def _from_data(run: Run) -> tuple[dict, str]:
    """The values by dotted key, and a sentence about them."""
    config, data, values = run.config, run.config.data, {}
    told = {"progress": jax.process_index() == 0, "report_skipped": False}
    told |= {"classes": run.classes, "marker": run.marker}
    cache = build_cache(run.kind.records, data.train, run.tokenizer, data, config.seed, **told)
    fraction = 0.0 if data.val else data.val_fraction
    if fraction is None:
        fraction = values["data.val_fraction"] = defaults.share_held_out(len(cache), config.figures)
        if not fraction and config.training.patience:
            values["training.patience"] = 0  # nothing to be patient about
    documents, held_out = split_records(cache.records, fraction, config.seed)
    plan = plan_epoch(cache, documents, data, config.seed, 0).plan
    trained = round(cache.info["trained_tokens"] * plan.tokens / cache.info["tokens"])
    amount = defaults.Amount(len(documents), plan.tokens, trained, max(1, plan.rows))
    parameters = count_parameters(without_adapters(run.model.abstract_params()))
    values |= defaults.following(config, amount, parameters, row_shards(run.mesh))
    aside = f", {len(held_out):,} held out" * bool(len(held_out))
    return (
        values,
        f"{amount.records:,} records to train on ({amount.tokens:,} {config.unit}, {amount.rows:,} rows){aside}",
    )
