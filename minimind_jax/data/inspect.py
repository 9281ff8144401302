"""`minimind data inspect`: records as the model sees them, and what they amount to."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minimind_jax.config.sections import AnyConfig, DataConfig, ReadingConfig
from minimind_jax.config.tools import InspectConfig
from minimind_jax.data.epoch import plan_epoch
from minimind_jax.data.images import open_image
from minimind_jax.data.inspect_page import Shown, write_page
from minimind_jax.data.jsonl import READING, Record, expand_paths, iter_records, reading_of
from minimind_jax.data.kinds import KINDS, KindName, kind_of_record
from minimind_jax.data.packing import PackingPlan
from minimind_jax.data.pictures import MARKER, Marker, PictureFile
from minimind_jax.data.token_cache import TokenCache, build_cache
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.data.written import check_output
from minimind_jax.errors import UserError

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
SHOWN_ERRORS = 20
PROMPT_FIELDS = {"prompt", "problem", "answer", "gt", "ground_truth", "reward_model"}  # that prompts have, and others
MARKS = "⟦", "⟧"  # around trained tokens, where there is no colour
TRAINED_STYLE = "bold green"

# What moves the cursor, clears the screen or turns the order of the letters: C0 and C1, and the marks of direction.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {c: f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" for c in _CONTROLS if chr(c) not in "\n\t"}
_UNMARKED = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in MARKS})


class Inspection(NamedTuple):
    """What `inspect` found. packings: by name, at the configured `seq_len`."""

    cache: TokenCache
    packings: dict[str, PackingPlan]


def run(config: InspectConfig) -> None:
    data = AnyConfig(seq_len=config.seq_len, **dataclasses.asdict(reading_of(config)))
    marker = Marker(tokens=config.image_tokens)
    if config.html:
        check_output(Path(config.html), expand_paths(config.files), complete=None)
    tokenizer = Tokenizer.load(config.tokenizer)
    found = inspect(config.files, tokenizer, data, config.kind, config.rows, config.seed, marker=marker)
    if config.html:
        write_page(Path(config.html), _first_records(found.cache, tokenizer, config.rows, config.seq_len), marker)
        print(f"records with their pictures: {config.html}")


def inspect(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    data: DataConfig,
    kind: KindName | None = None,
    rows: int = 3,
    seed: int = 42,
    console: Console | None = None,
    marker: Marker = MARKER,
) -> Inspection:
    """Prints the first records with their trained tokens coloured, counts, lengths, packing and broken records.

    kind: found from the first record if None. marker: of the model that is to see images. Broken records are listed
    with file and line and otherwise skipped.
    Raises UserError for missing files, for fields it does not know, and if no record is usable.
    """
    console = console or Console()
    files = expand_paths(paths)
    told = "" if kind else _as_prompts(files, data)
    kind = kind or detect_kind(files, data)
    skipping = dataclasses.replace(data, on_error="skip")
    cache = build_cache(kind, files, tokenizer, skipping, seed, report_skipped=False, marker=marker)
    packings = {}
    for name in KINDS[kind].packings:
        packings[name] = plan_epoch(cache, np.arange(len(cache)), data, seed, epoch=0, packing=name).plan
    _print_records(console, _first_records(cache, tokenizer, rows, data.seq_len), marker)
    _print_counts(console, cache, tokenizer, files)
    if told:
        console.print(told, highlight=False)
    _print_lengths(console, cache.lengths)
    if packings:
        _print_packings(console, Inspection(cache, packings), data.seq_len)
    _print_broken(console, cache)
    return Inspection(cache, packings)


def detect_kind(files: list[Path], reading: ReadingConfig = READING) -> KindName:
    """`text`, `conversation`, `preference` or `images`, from the first readable record. Raises UserError if it is
    none."""
    return kind_of_record(_first(files, reading), reading)


def _first(files: list[Path], reading: ReadingConfig) -> Record:
    broken: list[UserError] = []
    for record in iter_records(files, broken.append, reading):
        return record
    raise UserError(f"{', '.join(map(str, files))}: no line is a JSON object; the first: {broken[0]}")


def _as_prompts(files: list[Path], reading: ReadingConfig) -> str:
    """What is told of records that grpo, ppo and agent would read otherwise."""
    names = sorted(_first(files, reading).value.keys() & PROMPT_FIELDS)
    return f"(with `{names[0]}`: --kind prompt shows them as grpo, ppo and agent ask them)" if names else ""


def printable(text: str) -> str:
    """Text of a record as a terminal may show it: control characters and marks of direction as `\\x1b`, `\\u202e`."""
    return text.translate(_ESCAPES)


def pieces_of(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray) -> list[tuple[str, bool]]:
    """Runs of tokens that are all trained or all not: `printable` text, in which ⟦ and ⟧ are spelled out too, and
    whether they are."""
    bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    runs = [(ids[a:b].tolist(), bool(trained[a])) for a, b in itertools.pairwise(bounds) if b > a]
    decoded = [(tokenizer.decode(run, skip_special_tokens=False), is_trained) for run, is_trained in runs]
    return [(printable(text).translate(_UNMARKED), is_trained) for text, is_trained in decoded]


def styled(pieces: Iterable[tuple[str, bool]], console: Console | None = None) -> Text:
    """Trained tokens are coloured, and in ⟦⟧ but for a terminal with colours."""
    marks = ("", "") if console and console.is_terminal and not console.no_color else MARKS
    shown = ((text.join(marks), TRAINED_STYLE) if is_trained else (text, "dim") for text, is_trained in pieces)
    return Text.assemble(*shown)


def print_legend(console: Console) -> None:
    console.rule(Text("trained tokens look ").append_text(styled([("like this", True)], console)), align="left")


def _first_records(cache: TokenCache, tokenizer: Tokenizer, count: int, shown: int) -> Iterator[Shown]:
    """At most `count`, each to its token `shown`."""
    for document in range(min(count, len(cache))):
        length = int(cache.lengths[document])
        trained = cache.is_trained(document, 0, shown)
        trained[0] = False  # nothing comes before the first token that could predict it
        trained &= cache.info["trained_tokens"] > 0  # of a prompt none is
        pieces = pieces_of(tokenizer, cache.ids(document, 0, shown), trained)
        pictures = [] if cache.pictures is None else [picture for _, picture in cache.pictures.of(document)]
        yield Shown(int(cache.records[document]) + 1, length, pieces, pictures, max(0, length - shown))


def _print_records(console: Console, records: Iterable[Shown], marker: Marker) -> None:
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007
        images = _image_names(record.pictures)
        text = styled(((_with_images(piece, marker, images), learns) for piece, learns in record.pieces), console)
        if record.left:
            text.append(f" … and {record.left:,} more tokens", "italic")
        console.rule(record.title, align="left")
        console.print(text, soft_wrap=True)
    if count:
        print_legend(console)


def _image_names(pictures: list[PictureFile]) -> Iterator[str]:
    """What is shown in the places of a record's images, one after another."""
    for number, picture in enumerate(pictures, 1):
        name = printable(str(picture)) if isinstance(picture, Path) else f"{len(picture):,} bytes"
        width, height = open_image(picture, name).size
        yield f"[image {number}: {width} x {height}, {name}]"


def _with_images(piece: str, marker: Marker, names: Iterator[str]) -> str:
    """A piece of a record with the next names in place of runs of markers."""
    return re.sub(re.escape(marker.all), lambda found: next(names, found[0]), piece)


def _print_counts(console: Console, cache: TokenCache, tokenizer: Tokenizer, files: list[Path]) -> None:
    info, token_bytes = cache.info, tokenizer.token_bytes()
    parts = np.array_split(cache.tokens, info["tokens"] // (1 << 20) + 1)  # not all in memory at once
    size = sum(int(token_bytes[part].sum()) for part in parts)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("kind", cache.kind),
        ("files", f"{len(files):,}"),
        ("records", f"{len(cache) + info['skipped']:,}, {info['skipped']:,} of them broken"),
        ("tokens", f"{info['tokens']:,}, {size / info['tokens']:.2f} bytes of text each"),
        ("trained tokens", f"{info['trained_tokens']:,} ({info['trained_tokens'] / info['tokens']:.1%})"),
        *((name, f"{info[name]:,}") for name in KINDS[cache.kind].counts),
    ):
        table.add_row(name, value)
    console.print(table)


def _print_lengths(console: Console, lengths: np.ndarray) -> None:
    table = _table(*(f"{p}%" for p in PERCENTILES))
    table.add_row(*(f"{int(n):,}" for n in np.percentile(lengths, PERCENTILES, method="lower")))
    console.print(Text("tokens of a record, percentiles", "italic"), table, sep="\n")
    powers = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(powers)
    for power in range(int(powers.min()), len(counts)):
        bar = "█" * round(40 * counts[power] / counts.max())
        console.print(f"  up to {2**power:>9,}  {counts[power]:>10,}  {bar}", highlight=False)


def _print_packings(console: Console, found: Inspection, seq_len: int) -> None:
    count, noun = len(found.cache), KINDS[found.cache.kind].noun
    title = Text(f"\npacking {count:,} {noun} into rows of {seq_len:,} tokens", "italic")
    table = _table("", "rows", "full", "placed", "lost", "cut", "turns\ncut", "tokens\ndropped")
    for name, plan in found.packings.items():
        placed = len(np.unique(plan.documents))
        numbers = (placed, count - placed, plan.cut_documents, plan.cut_turns, plan.dropped_tokens)
        table.add_row(name, f"{plan.rows:,}", f"{plan.efficiency:.2%}", *(f"{n:,}" for n in numbers))
    console.print(title, table, sep="\n")


def _table(*columns: str) -> Table:
    """Numbers in millions fit 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", min_width=5, overflow="fold")
    return table


def _print_broken(console: Console, cache: TokenCache) -> None:
    messages = cache.info["skipped_messages"][:SHOWN_ERRORS]
    if messages:
        console.print(Text(f"{cache.info['skipped']:,} broken records", "bold red"))
    for message in messages:
        console.print(f"  {printable(message)}", markup=False, highlight=False, soft_wrap=True)
    if cache.info["skipped"] > len(messages):
        console.print(f"  … and {cache.info['skipped'] - len(messages):,} more")
