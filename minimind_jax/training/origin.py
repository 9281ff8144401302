"""What a run starts from: its settings, and weights told by what they are, for a folder may be trained anew under the
same name."""

from pathlib import Path
from typing import Any

from minimind_jax.agreement import check_agreement, code_hash, on_all
from minimind_jax.config.stages import RunConfig
from minimind_jax.convert.identity import tokenizer_hash, weights_hash, words_hash
from minimind_jax.convert.load import load_tokenizer
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.paths import is_remote
from minimind_jax.training.run import RunFolder, flat, package_versions, plain


def start_models(config: RunConfig) -> dict[str, str]:
    """{init_from: hash of the weights, teacher.model: the same}, of those that are set. Takes a fraction of a second.

    Of adapters the weights below them count, too. Raises UserError for a model that is not there.
    """
    named = {"init_from": config.init_from}
    if teacher := getattr(config, "teacher", None):
        named["teacher.model"] = teacher.model
    return {key: weights_hash(resolve_model_folder(name, key)) for key, name in named.items() if name}


def agreed_settings(config: RunConfig) -> dict[str, Any]:
    """What the processes of a run are told and run with, by name, for `check_agreement`.

    Folders and threads may differ; what is in them is compared later."""
    own = {"run", "resume", "init_from", "tokenizer", "teacher.model", "tracking.loggers", "tracking.project"}
    own |= {f"data.{name}" for name in ("train", "val", "cache_dir", "tokenizer_workers", "loader_workers")}
    settings = {f"the setting {key}": value for key, value in flat(plain(config)).items() if key not in own}
    versions = {f"the version of {package}": version for package, version in package_versions().items()}
    return {**settings, **versions, "the code of minimind_jax": code_hash()}


def check_start_models(run: RunFolder, config: RunConfig) -> None:
    """Notes the run's `start_models`, and its tokenizer. Raises UserError when a model holds other weights now, or the
    tokenizer other words, than when the run was started, and where the weights of the processes differ.

    The checkpoint goes on from the old ones, and what is computed from them anew (a reference, a teacher, a frozen
    base) would be of the new.
    """
    run.start_models = on_all(lambda: start_models(config))
    check_agreement({f"the weights of {key}": found for key, found in run.start_models.items()})
    before = run.read_environment().get("start_models", {}) if run.checkpoint_steps() else {}
    for key, found in run.start_models.items():
        if before.get(key, found) != found:
            name = config.init_from if key == "init_from" else config.teacher.model
            raise UserError(
                f"{key} {name} holds other weights than when {run.path} was started (their hash is {found}, and was "
                f"{before[key]}); restore them to go on, or start another run"
            )
    if config.tokenizer and not is_remote(Path(config.tokenizer)):  # only noted: a changed one changes the data
        run.start_models["tokenizer"] = tokenizer_hash(Path(config.tokenizer).expanduser())
    if words := _words(config):
        check_words(run, words)
        run.start_models["words"] = words_hash(words)


def _words(config: RunConfig) -> Tokenizer | None:
    """The run's tokenizer; None where there is none, which the stage says."""
    try:
        folder = config.init_from and resolve_model_folder(config.init_from, "init_from")
        return load_tokenizer(folder, config.tokenizer) if folder else Tokenizer.load(config.tokenizer)
    except UserError:
        return None


def check_words(run: RunFolder, tokenizer: Tokenizer) -> None:
    """Raises UserError when the run's checkpoints were made with a tokenizer of other words."""
    before = run.read_environment().get("start_models", {}) if run.checkpoint_steps() else {}
    if before.get("words", words_hash(tokenizer)) != words_hash(tokenizer):
        raise UserError(
            f"the tokenizer {tokenizer.folder} has other words than when {run.path} was started: the ids of its "
            "checkpoints mean other text; restore the tokenizer, or start another run"
        )
