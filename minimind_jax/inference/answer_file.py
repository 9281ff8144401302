"""A file of answers, written line by line, that a killed command goes on with."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError


class AnswerFile:
    """JSON lines on their way to `output`: in OUTPUT.partial until all are there, what made them in
    OUTPUT.partial.settings.

    earlier: the lines that an earlier call has written, when they were made with the same settings; a line that was
        not finished is cut off.
    """

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool):
        """Raises UserError if nothing can be written there, or if the earlier lines were made with other settings."""
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._settings = output.with_name(output.name + ".partial.settings")
        self.earlier: list[dict[str, Any]] = []
        try:
            if resume and self._partial.exists():
                self._check(settings)
                self._read()
            self._file = self._partial.open("a" if self.earlier else "w", encoding="utf-8")
            self._settings.write_text(json.dumps(settings, ensure_ascii=False, indent=1), "utf-8")
        except OSError as error:
            raise UserError(f"output {output}: cannot write: {error.strerror}; choose another place") from error

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, answer: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._partial}: cannot write: {error.strerror}; make room and give the same command again, which "
                "goes on from here"
            ) from error

    def finish(self) -> None:
        """Gives the file its name."""
        self._file.close()
        os.replace(self._partial, self._output)
        self._settings.unlink()

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._settings.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            earlier = {}
        other = [name for name, value in settings.items() if earlier.get(name, "nothing") != value]
        if other:
            name = other[0]
            raise UserError(
                f"{self._partial} was made with {name} {earlier.get(name)!r}, now it is {settings[name]!r}; give the "
                "earlier settings to go on, or --resume never to begin anew"
            )

    def _read(self) -> None:
        with self._partial.open("rb+") as file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.earlier.append(json.loads(line))
                whole += len(line)
            file.truncate(whole)


def what_makes(config, folder: Path) -> dict[str, Any]:
    """Settings that an answer depends on, and which model it is: names, sizes and times of its files."""
    settings = dataclasses.asdict(config)
    for name in ("output", "input", "prompt", "batch_size", "resume"):
        settings.pop(name)
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
    model = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files}
    return json.loads(json.dumps({**settings, "model": str(folder.resolve()), "model files": model}))
