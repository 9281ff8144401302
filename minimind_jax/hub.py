"""Models and tokenizers by their name on the Hugging Face hub (`Qwen/Qwen3-0.6B`, `NAME@REVISION`).

They are kept in the hub's own cache ($HF_HOME), which other tools read, too; its locks let one of several processes
fetch a file while the others wait, and what was cut off goes on. A run remembers the commits that it began with.
"""

import contextlib
import functools
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from minimind_jax.errors import UserError, first_line

_NAME = re.compile(r"(?!runs/)([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

TOKENIZER_PATTERNS = ("*.json", "*.jinja", "merges.txt")
WEIGHTS = "*.safetensors"
TORCH_WEIGHTS = "pytorch_model*.bin"  # fetched where a model has no others

_pinned: dict[str, str] = {}
_used: dict[str, str] = {}


def is_hub_name(name: str) -> bool:
    """Whether a name could be a model's on the hub: OWNER/NAME, maybe with @REVISION."""
    return _NAME.fullmatch(name) is not None


def origin_of(folder: Path) -> tuple[str, str] | None:
    """(OWNER/NAME, commit) of a model's folder in the hub's cache; None for any other folder."""
    *_, repository, snapshots, commit = ("", "", *folder.parts)
    found = re.fullmatch(r"models--([^/]+?)--([^/]+)", repository)
    return (f"{found[1]}/{found[2]}", commit) if found and snapshots == "snapshots" else None


def pin(commits: Mapping[str, str]) -> None:
    """From here on these names mean these commits: those that the run at hand began with."""
    _pinned.clear()
    _pinned.update(commits)
    _used.clear()
    _used.update(commits)


def used_commits() -> dict[str, str]:
    """name -> commit of everything that was fetched for the run at hand, for `pin` when it goes on."""
    return dict(_used)


def fetch(name: str, setting: str = "model", weights: bool = True) -> Path:
    """The folder, in the hub's cache, of a model (weights false: of its tokenizer and configuration alone).

    setting: what the user gave the name as, for messages. $HF_ENDPOINT names a mirror, $HF_TOKEN opens gated models,
    $HF_HUB_OFFLINE=1 takes what is in the cache.

    Raises UserError when it is not there or cannot be fetched, with the command that would.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = _fetch(name, _pinned.get(name), weights)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _explained(error, name, setting) from error
    _used[name] = folder.name
    return folder


@functools.cache
def _fetch(name: str, commit: str | None, weights: bool) -> Path:
    from huggingface_hub import constants  # reads the environment when it is imported

    repository, revision = _NAME.fullmatch(name).groups()
    revision = commit or revision
    patterns = (*TOKENIZER_PATTERNS, *[WEIGHTS] * weights)
    offline = constants.HF_HUB_OFFLINE
    if not offline and revision and _COMMIT.fullmatch(revision):  # its files never change
        with contextlib.suppress(OSError):
            folder = _snapshot(repository, revision, patterns, offline=True)
            if not weights or any(folder.glob(WEIGHTS)) or any(folder.glob(TORCH_WEIGHTS)):
                return folder
    if not offline:
        print(f"{name}: fetching from {_endpoint()}", file=sys.stderr, flush=True)
    folder = _snapshot(repository, revision, patterns, offline)
    if weights and not any(folder.glob(WEIGHTS)):
        folder = _snapshot(repository, revision, (*TOKENIZER_PATTERNS, TORCH_WEIGHTS), offline)
    return folder


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...], offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"],
            local_files_only=offline, endpoint=_endpoint(), cache_dir=os.environ.get("HF_HUB_CACHE"),
        )
    )  # fmt: skip


def _explained(error: Exception, name: str, setting: str) -> UserError:
    from huggingface_hub import constants, errors

    repository, revision = _NAME.fullmatch(name).groups()
    page, target = f"{_endpoint()}/{repository}", repository.split("/")[1]
    words = ["hf", "download", repository, *(("--revision", revision) if revision else ()), "--local-dir", target]
    by_hand = f"{shlex.join(words)}      # then give {setting} the folder {target}"
    if isinstance(error, errors.GatedRepoError):
        reason = f"its owner wants you to accept terms: do so on {page}, and set HF_TOKEN to a token of yours"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = f"{page} does not exist, or is private: check the name, or set HF_TOKEN to a token that may read it"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"{page} has no revision {revision}"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        asked = "was not asked (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "gave no answer"
        reason = (
            f"{_endpoint()} {asked}, and the hub's cache here does not hold it ({first_line(error)}); check the "
            "connection, or name a mirror (HF_ENDPOINT=https://hf-mirror.com)"
        )
    elif isinstance(error, OSError) and error.strerror:
        place = error.filename or "the cache"
        reason = f"{place}: {error.strerror}; free space there, or set HF_HOME to another folder"
    else:
        reason = first_line(error)
    told = f"{setting}: {name} cannot be fetched: {reason}. By hand, where there is a connection:"
    return UserError(f"{told}\n  {by_hand}")
