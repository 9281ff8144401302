"""`minimind data convert`: records of any format, written in ours."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.config.tools import ConvertDataConfig
from minimind_jax.data.formats import recognise
from minimind_jax.data.jsonl import Record, expand_paths, iter_records, tell, tell_left_out
from minimind_jax.data.kinds import KINDS, KindName, Wanted, kind_of_record
from minimind_jax.data.labels import LABEL_FIELDS, Classes
from minimind_jax.data.written import check_output, replacing_files
from minimind_jax.errors import UserError


def run(config: ConvertDataConfig) -> None:
    """Writes the records of the files as JSON lines in our own format, and says what was left out. Raises UserError for
    a broken record that is not to be skipped, and for an output that is there already or cannot be written."""
    renamed, kind = parse_renamed(config.rename), config.kind
    files, target = expand_paths(config.files), Path(config.output)
    if target.suffix != ".jsonl":
        raise UserError(f"output {target}: expected a name ending in .jsonl")
    check_output(target, files)
    errors: list[UserError] = []

    def on_bad(error: UserError) -> None:
        if config.on_error == "stop":
            raise error
        errors.append(error)

    wanted = Wanted(config, Classes.any(config.text_field or "text", config.label_field), "--on_error")
    told: Counter = Counter()
    found: Counter = Counter()
    with replacing_files(target) as (partial,), open(partial, "w", encoding="utf-8") as file:
        for record in iter_records(files, on_bad, config, told):
            try:
                record = _renamed(record, renamed)
                kind = kind or _kind(record, config)
                row = KINDS[kind].as_record(KINDS[kind].parse(record, wanted))
            except UserError as error:
                on_bad(error)
                continue
            known = recognise(record.value, kind, config.ignore_fields)
            found[known.name if known else kind] += 1
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        if not found:
            raise UserError(
                f"no usable record in {', '.join(config.files)}; the first was skipped because of {errors[0]}"
            )
    tell(told)
    tell_left_out(config.files)
    if errors:
        print(f"{len(errors):,} records skipped; the first: {errors[0]}", file=sys.stderr)
    formats = ", ".join(f"{name} ({count:,})" for name, count in found.items())
    print(f"{found.total():,} records written to {target}; read as {formats}")


def parse_renamed(pairs: Sequence[str]) -> dict[str, str]:
    """OLD=NEW as a dict. Raises UserError."""
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise UserError(f"--rename {pair}: expected OLD=NEW, as in Frage=instruction")
    return dict(pair.split("=", 1) for pair in pairs)


def _renamed(record: Record, names: dict[str, str]) -> Record:
    """Raises UserError where a new name is taken."""
    if not names:
        return record
    value = {names.get(name, name): item for name, item in record.value.items()}
    if len(value) < len(record.value):
        taken = next(new for old, new in names.items() if old in record.value and new in record.value)
        raise UserError(f"{record.where}: the field {taken!r} is there already; rename that, too")
    return dataclasses.replace(record, value=value)


def _kind(record: Record, reading: ReadingConfig) -> KindName:
    found = kind_of_record(record, reading)
    return "labelled" if found == "text" and record.value.keys() & set(LABEL_FIELDS[:2]) else found
