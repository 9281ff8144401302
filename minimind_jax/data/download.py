"""`minimind data download`: MiniMind's public data files, from Hugging Face or ModelScope."""

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from minimind_jax.config.tools import DownloadConfig
from minimind_jax.errors import UserError

Source = Literal["huggingface", "modelscope"]

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

CONNECTIONS = 5  # tried in a row without a byte of progress
CHUNK = 1 << 20
TIMEOUT = 30  # seconds without an answer


def run(config: DownloadConfig) -> None:
    """Downloads what `config` names, and prints where it lies."""
    for path in download(config.what, config.target, config.source):
        print(path)


def download(what: str | Sequence[str], target: str | Path = "data", source: Source = "huggingface") -> list[Path]:
    """Downloads files of MiniMind's data set into the folder `target`; returns their paths.

    what: `mini`, `all`, or names of files; ".jsonl" may be left out. What was cut off goes on where it stopped, and a
    file has its name only once it is complete. HF_ENDPOINT names a mirror of Hugging Face, MODELSCOPE_ENDPOINT
    another address of ModelScope.

    Raises UserError for an unknown source, a file that is not there, no connection, and a disk that is full.
    """
    fetchers = {"huggingface": _from_huggingface, "modelscope": _from_modelscope}
    if source not in fetchers:
        raise UserError(f"source is {source!r}; it must be {' or '.join(fetchers)}")
    target = Path(target).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot make this folder: {error}") from error
    return [fetchers[source](name, target) for name in file_names(what)]


def file_names(what: str | Sequence[str]) -> list[str]:
    """The names of the files that sets and shortened names stand for."""
    given = [what] if isinstance(what, str) else what
    names = [name for item in given for name in SETS.get(item, (_with_suffix(item),))]
    return list(dict.fromkeys(names))


def _with_suffix(name: str) -> str:
    return name if Path(name).suffix else f"{name}.jsonl"


def _from_huggingface(name: str, target: Path) -> Path:
    from huggingface_hub import constants, hf_hub_download  # reads HF_ENDPOINT when it is imported
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = f"{constants.ENDPOINT}/datasets/{HUGGINGFACE_REPOSITORY}"
    try:
        return Path(hf_hub_download(HUGGINGFACE_REPOSITORY, name, repo_type="dataset", local_dir=target))
    except LocalEntryNotFoundError as error:  # the library's word for: no answer, and no copy on this machine
        raise _no_connection(place, error) from error
    except EntryNotFoundError as error:
        raise _no_such_file(name, place) from error
    except OSError as error:
        raise UserError(f"{place}: {name} cannot be downloaded: {error}; run the command again to go on") from error


def _from_modelscope(name: str, target: Path) -> Path:
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")
    place = f"{endpoint}/datasets/{MODELSCOPE_REPOSITORY}"
    url = f"{place}/resolve/master/{urllib.parse.quote(name)}"
    path, part, tries = target / name, target / f"{name}.part", 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, path, part):
                return path
            problem: Exception = ConnectionError("the connection was closed before the end of the file")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise _no_such_file(name, place) from error
            if error.code == 416 and _take_whole(path, part, error.headers):
                return path
            problem = error
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            problem = error
        except OSError as error:
            raise UserError(f"{part}: cannot be written: {error}; what is there is kept") from error
        moved = part.exists() and part.stat().st_size > before
        tries = 0 if moved else tries + 1
        if tries == CONNECTIONS or isinstance(getattr(problem, "reason", None), OSError):
            raise _no_connection(place, problem) from problem


def _fetch_rest(url: str, path: Path, part: Path) -> bool:
    """Appends to `part` what is missing of the file and renames it; False if the connection ended too soon.

    The part is taken up only if the server says, by the tag kept beside it, that the file is still the same.
    """
    tag_file = part.with_suffix(".tag")
    have = part.stat().st_size if part.exists() and tag_file.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()} if have else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:
            have = 0
        total = have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        if path.exists() and path.stat().st_size == total:
            return True
        tag_file.unlink(missing_ok=True)
        if tag := response.headers.get("ETag"):
            tag_file.write_text(tag)
        _write_body(response, part, have, total)
    if total is not None and part.stat().st_size < total:
        return False
    part.replace(path)
    tag_file.unlink(missing_ok=True)
    return True


def _take_whole(path: Path, part: Path, answer: Mapping[str, str]) -> bool:
    """Renames a part of which the server has nothing more to send because it is whole: the program was killed just
    before. Any other is removed, to be fetched anew. answer: headers of a 416."""
    tag_file = part.with_suffix(".tag")
    total = (answer.get("Content-Range") or "").rpartition("/")[2]
    is_whole = total == str(part.stat().st_size) and answer.get("ETag", tag_file.read_text()) == tag_file.read_text()
    if is_whole:
        part.replace(path)
    part.unlink(missing_ok=True)
    tag_file.unlink(missing_ok=True)
    return is_whole


def _write_body(response, part: Path, have: int, total: int | None) -> None:
    columns = (TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with open(part, "ab" if have else "wb") as file, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=have)
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            bar.advance(task, len(chunk))


def _no_such_file(name: str, place: str) -> UserError:
    return UserError(f"{place} has no file {name}; MiniMind's files are {', '.join(FILES)}")


def _no_connection(place: str, error: Exception) -> UserError:
    return UserError(
        f"{place} cannot be reached: {error}; check the connection, try --source modelscope or huggingface, or name a "
        "mirror, as in HF_ENDPOINT=https://hf-mirror.com. What has arrived is kept: run the command again"
    )
