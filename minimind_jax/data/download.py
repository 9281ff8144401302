"""`minimind data download`: MiniMind's public data files, from Hugging Face or ModelScope, by their own libraries."""

import os
from collections.abc import Sequence
from pathlib import Path

from minimind_jax.config.tools import DownloadConfig
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.shell import needing

HUGGINGFACE_REPOSITORY = "jingyaogong/minimind_dataset"
MODELSCOPE_REPOSITORY = "gongjy/minimind_dataset"
FILES = {
    "pretrain_t2t_mini.jsonl": "1.2 GB, pretraining, enough for a model that chats",
    "pretrain_t2t.jsonl": "10 GB, pretraining",
    "sft_t2t_mini.jsonl": "1.6 GB, conversations and tool calls, enough for a model that chats",
    "sft_t2t.jsonl": "14 GB, conversations and tool calls",
    "dpo.jsonl": "53 MB, preferences",
    "rlaif.jsonl": "24 MB, prompts for reinforcement learning",
    "agent_rl.jsonl": "86 MB, tool use with answers to check",
    "agent_rl_math.jsonl": "18 MB, mathematics with answers to check",
}
SETS = {"mini": ("pretrain_t2t_mini.jsonl", "sft_t2t_mini.jsonl"), "all": tuple(FILES)}


def run(config: DownloadConfig) -> None:
    """Downloads files of MiniMind's data set, and prints where they lie.

    What was cut off goes on where it stopped, and a file has its name only once it is complete.
    Raises UserError for a file that is not there, no connection, and a disk that is full.
    """
    target, names = Path(config.target).expanduser(), file_names(config.what)
    with disk_errors(f"{target}: cannot make this folder", "choose another with --target"):
        target.mkdir(parents=True, exist_ok=True)
    fetch = {"huggingface": _from_huggingface, "modelscope": _from_modelscope}[config.source]
    fetch(names, target)
    print(*(target / name for name in names), sep="\n")


def file_names(what: Sequence[str]) -> list[str]:
    """The names of the files that sets and shortened names (without .jsonl) stand for."""
    names = [name for item in what for name in SETS.get(item, (item if Path(item).suffix else f"{item}.jsonl",))]
    return list(dict.fromkeys(names))


def _from_huggingface(names: list[str], target: Path) -> None:
    from huggingface_hub import constants, hf_hub_download  # reads HF_ENDPOINT when it is imported
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = f"{constants.ENDPOINT}/datasets/{HUGGINGFACE_REPOSITORY}"
    for name in names:
        try:
            hf_hub_download(HUGGINGFACE_REPOSITORY, name, repo_type="dataset", local_dir=target)
        except LocalEntryNotFoundError as error:  # the library's word for: no answer, and no copy on this machine
            raise _no_connection(place, error) from error
        except EntryNotFoundError as error:
            raise _no_such_file(name, place) from error
        except OSError as error:
            raise UserError(f"{place}: {name} cannot be downloaded: {error}; run the command again to go on") from error


def _from_modelscope(names: list[str], target: Path) -> None:
    with needing("--source modelscope needs the package modelscope", "modelscope"):
        from modelscope.hub.errors import HubError
        from modelscope.hub.snapshot_download import dataset_snapshot_download

    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")
    place = f"{endpoint}/datasets/{MODELSCOPE_REPOSITORY}"
    try:
        dataset_snapshot_download(MODELSCOPE_REPOSITORY, endpoint=endpoint, local_dir=str(target), allow_patterns=names)
    except (HubError, OSError) as error:
        raise _no_connection(place, error) from error
    for name in names:
        if not (target / name).is_file():  # what the repository does not have is passed over
            raise _no_such_file(name, place)


def _no_such_file(name: str, place: str) -> UserError:
    return UserError(f"{place} has no file {name}; MiniMind's files are {', '.join(FILES)}")


def _no_connection(place: str, error: Exception) -> UserError:
    return UserError(
        f"{place} cannot be reached, or its files not be written: {error}; check the connection and the disk, try "
        "--source modelscope or huggingface, or name a mirror, as in HF_ENDPOINT=https://hf-mirror.com. What has "
        "arrived is kept: run the command again"
    )
