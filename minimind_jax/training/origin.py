"""What a run starts from: its settings, and weights told by what they are, for a folder may be trained anew under the
same name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minimind_jax.agreement import check_agreement, code_hash, on_all
from minimind_jax.config.fields import names_of
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.identity import tokenizer_hash, weights_hash, words_hash
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.paths import is_remote
from minimind_jax.training.run import RunFolder, flat, package_versions, plain


def find_models(config: RunConfig, keys: Collection[str] | None = None) -> dict[str, Path]:
    """The folders of the models that the settings name, by setting. keys: those that are looked for; all by default.
    Raises UserError for one that is not there."""
    named = named_models(config)
    return {key: resolve_model_folder(name, key) for key, name in named.items() if keys is None or key in keys}


def named_models(config: RunConfig) -> dict[str, str]:
    """The models that the settings name, by setting."""
    values = flat(plain(config))
    return {key: values[key] for key, what in names_of(type(config)).items() if what == "model" and values[key]}


def agreed_settings(config: RunConfig) -> dict[str, Any]:
    """What the processes of a run are told and run with, by name, for `check_agreement`.

    Folders and threads may differ; what is in them is compared later."""
    own = {"run", "resume", "tracking.loggers", "tracking.project", "data.tokenizer_workers", "data.loader_workers"}
    own |= names_of(type(config)).keys()
    settings = {f"the setting {key}": value for key, value in flat(plain(config)).items() if key not in own}
    versions = {f"the version of {package}": version for package, version in package_versions().items()}
    return {**settings, **versions, "the code of minimind_jax": code_hash()}


def check_start_models(run: RunFolder, config: RunConfig, models: Mapping[str, Path]) -> None:
    """Notes the run's `start_models`, hashes of weights (of adapters those below them count, too), and its tokenizer.

    models: as of `find_models`. Raises UserError when one holds other weights now than when the run was started, and
    where the weights of the processes differ: the checkpoint goes on from the old ones, and what is computed from them
    anew (a reference, a teacher, a frozen base) would be of the new.
    """
    run.start_models = on_all(lambda: {key: weights_hash(folder) for key, folder in models.items()})
    check_agreement({f"the weights of {key}": found for key, found in run.start_models.items()})
    before = run.start_hashes()
    for key, found in run.start_models.items():
        if before.get(key, found) != found:
            raise UserError(
                f"{key} {flat(plain(config))[key]} holds other weights than when {run.path} was started (their hash is "
                f"{found}, and was {before[key]}); restore them to go on, or start another run"
            )
    if config.tokenizer and not is_remote(Path(config.tokenizer)):  # only noted: a changed one changes the data
        run.start_models["tokenizer"] = tokenizer_hash(Path(config.tokenizer).expanduser())


def check_words(run: RunFolder, tokenizer: Tokenizer) -> None:
    """Notes the tokenizer's words. Raises UserError when the run's checkpoints were made with one of others."""
    found = words_hash(tokenizer)
    if run.start_hashes().get("words", found) != found:
        raise UserError(
            f"the tokenizer {tokenizer.folder} has other words than when {run.path} was started: the ids of its "
            "checkpoints mean other text; restore the tokenizer, or start another run"
        )
    run.start_models["words"] = found
