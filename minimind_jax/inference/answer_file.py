"""Files of answers, written line by line; one that a killed command goes on with."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from minimind_jax.data.written import json_line
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.signals import telling
from minimind_jax.texts import read_object, read_text

AGAIN = "--resume never begins anew"


class PartialFile:
    """Lines on their way to `output`, in OUTPUT.partial until all are there, by one process at a time.

    line: how an answer is written, without the end of the line.
    """

    _advice = "make room and give the same command again"
    _again = "the same command begins anew and writes over it"

    def __init__(self, output: Path, line: Callable[[dict[str, Any]], str] | None = None):
        """Raises UserError if nothing can be written there."""
        self._output, self._line = output, line or json_line
        self._partial = output.with_name(output.name + ".partial")
        self._lock = FileLock(output.with_name(output.name + ".partial.lock"))
        try:
            self._lock.acquire(timeout=0)
            self._file = self._open()
        except Timeout:
            raise UserError(f"{self._partial} is being written by another process; wait for it, or stop it") from None
        except (OSError, UserError) as error:
            if self._lock.is_locked:
                self._unlock()
            if isinstance(error, UserError):
                raise
            raise UserError(f"output {output}: cannot write: {error.strerror}; choose another place") from error

    def __enter__(self):
        self._telling = telling(self._what_is_left, of=(BaseException,))
        self._telling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by `write`
            self._file.close()
        self._leave()
        self._unlock()
        self._telling.__exit__(*error)

    def _what_is_left(self) -> str:
        return f"what was answered is in {self._partial}; {self._again}" if self._partial.exists() else ""

    def write(self, answer: dict[str, Any]) -> None:
        with disk_errors(f"{self._partial}: cannot write", self._advice):
            self._file.write(self._line(answer).encode() + b"\n")
            self._file.flush()

    def finish(self) -> None:
        """Gives the file its name."""
        self._file.close()
        os.replace(self._partial, self._output)

    def _open(self) -> BinaryIO:
        return self._partial.open("wb")

    def _leave(self) -> None:
        """Takes away what is of no use."""
        if self._partial.is_file() and not self._partial.stat().st_size:
            self._partial.unlink()

    def _unlock(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


class AnswerFile(PartialFile):
    """A partial file that can be gone on with; what made it is in OUTPUT.partial.settings.

    earlier: the lines that an earlier call has written, when they were made with the same settings; a line that was
        not finished is cut off.
    """

    _advice = f"{PartialFile._advice}, which goes on from here"
    _again = "the same command goes on from there"

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool):
        """Raises UserError if nothing can be written there, or if the earlier lines were made with other settings."""
        self.earlier: list[dict[str, Any]] = []
        self._settings = output.with_name(output.name + ".partial.settings")
        self._made_with, self._resume = settings, resume
        super().__init__(output)

    def _leave(self) -> None:
        super()._leave()
        if not self._partial.exists():
            self._settings.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._resume and self._partial.exists() and self._partial.stat().st_size:
            self._check()
            self._read()
        self._settings.write_text(json.dumps(self._made_with, ensure_ascii=False, indent=1), "utf-8")
        return self._partial.open("ab" if self.earlier else "wb")

    def _check(self) -> None:
        try:
            earlier = read_object(self._settings)
        except UserError:
            raise UserError(
                f"{self._partial} is there without {self._settings.name}, which says what made it; {AGAIN}"
            ) from None
        for name, value in self._made_with.items():
            if earlier.get(name) == value:
                continue
            if isinstance(value, dict):
                other = set(value.items()) ^ set(earlier.get(name, {}).items())
                raise UserError(f"{self._partial} was made with another model ({min(other)[0]} differs); {AGAIN}")
            raise UserError(
                f"{self._partial} was made with {name} {earlier.get(name)!r}, now it is {value!r}; give the earlier "
                f"settings to go on; {AGAIN}"
            )

    def _read(self) -> None:
        with self._partial.open("rb+") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line.decode())
                except ValueError:
                    answer = None
                if not isinstance(answer, dict) or "finish_reason" not in answer:
                    raise UserError(f"{self._partial}:{number} is damaged; remove it and all behind it, or {AGAIN}")
                self.earlier.append(answer)
                whole += len(line)
            file.truncate(whole)


def what_makes(config, folders: list[Path]) -> dict[str, Any]:
    """Settings that an answer depends on, and which model it is: hashes of the files in its folders."""
    settings = dataclasses.asdict(config)
    for name in ("model", "output", "input", "prompt", "image", "batch_size", "resume"):
        settings.pop(name)
    files = {}
    if config.schema:
        settings["schema"] = read_text(Path(config.schema))
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".jinja"):
                with file.open("rb") as stream:
                    files[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return json.loads(json.dumps({**settings, "model files": files}))
