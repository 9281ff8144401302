"""What a tokenizer was made from: a file in its folder, by which the same command asked again is told from another."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_jax.config.sections import FilesConfig
from minimind_jax.config.stages import TokenizerConfig
from minimind_jax.data.cache_folder import cache_root
from minimind_jax.data.content import file_identities
from minimind_jax.errors import UserError

ORIGIN = "made_from.json"


def origin_of(config: TokenizerConfig, files: Sequence[Path]) -> dict[str, Any]:
    """The settings that decide the tokens, and a hash of each file of records."""
    settings = dataclasses.asdict(config)
    for place in ("data", "output", "overwrite"):
        settings.pop(place)
    settings["ignore_fields"] = list(settings["ignore_fields"])  # as JSON has it
    return {**settings, "data": [content for *_, content in file_identities(files, cache_root(FilesConfig()))]}


def write_origin(folder: Path, origin: dict[str, Any]) -> None:
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", "utf-8")


def check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raises UserError unless the tokenizer in a folder was made from `origin`."""
    try:
        found = json.loads((folder / ORIGIN).read_text("utf-8"))
        differing = [key for key in sorted({*origin, *found}) if origin.get(key) != found.get(key)]
    except (OSError, ValueError, TypeError):
        differing = [f"no {ORIGIN} in it"]
    if differing:
        raise UserError(
            f"{folder} holds another tokenizer ({', '.join(differing)}), and what was trained with it needs it; choose "
            "another output, or pass --overwrite true to replace it"
        )
