"""What stands in files of text: JSON values in lines, arrays or pretty-printed, rows of CSV, whole documents.

Files are UTF-8, or what `data.encoding` says; an encoding is guessed only to word an error. Other bytes raise
UnicodeError, of which `undecodable` makes a UserError.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minimind_jax.data.messages import are_messages, is_message
from minimind_jax.errors import UserError

MAX_LINE = 1 << 28  # bytes; more is no record but a file without line ends, and would fill the memory
BOM = codecs.BOM_UTF8
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLOCK = 1 << 20  # characters of a JSON array read at a time
_SAMPLE = 1 << 16  # characters of a table that tell its separator
_EXTRA, _MISSING = "\0more columns", "\0no column"  # marks of a row of CSV that does not fit its header
_BROKEN = "\0broken"  # of an element of an array that is no JSON
_CUT = "a file that was cut off is to be had whole, or goes without its last record (in training: --data.on_error skip)"
csv.field_size_limit(MAX_LINE)
_SPACE = re.compile(r"[\s,]*")
# UTF-8 that was read as cp1252 or latin-1: of Western letters, of punctuation, of Russian and Chinese; and
# cp1252 that was read as latin-1
_TRAIL = "[" + bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\x80-\x9f]"
_GARBLED = re.compile(f"[ÂÃ]{_TRAIL}|â[€\x80]|(?:[ÐÑ]{_TRAIL}|[ã-é]{_TRAIL}{{2}}){{2}}|[\x80-\x84\x86-\x9f]")


def encoding_hint(raw: bytes) -> str:
    """What to do about bytes that are no UTF-8."""
    guess = _guess(raw)
    looks = f"it looks like {guess}: set data.encoding {guess}" if guess else "set data.encoding to what it is"
    return f"{looks} (of tools: --encoding), or save the file as UTF-8"


def spoiled(text: str) -> Iterator[str]:
    """What is told of text whose characters were read wrongly before it came here."""
    if not text.isascii():
        if _GARBLED.search(text):
            yield "text looks as if it had been read in a wrong encoding, as Ã¼ for ü (the package ftfy mends it)"
        if "\N{REPLACEMENT CHARACTER}" in text:
            yield "characters were lost before, and U+FFFD stands for them"


def other_forms(text: str, where: str) -> Iterator[str]:
    """What is told of a document that has a form, which is trained on too. Raises UserError for JSON."""
    text = text.lstrip()
    if _is_json(text):
        raise UserError(f"{where}: these are records of JSON in a file of text; give it a name that ends in .jsonl")
    if re.match(r"<!doctype html|<html", text, re.IGNORECASE):
        yield "this is HTML, whose tags are trained as all other text; save the text of the page"
    if re.match(r"(1|WEBVTT)\s+(\d+\s+)?\d\d:\d\d[:.,\d]* --> ", text):
        yield "these are subtitles, whose numbers and times are trained as all other text"


def _is_json(text: str) -> bool:
    """Whether a document is JSON, as far as its second value."""
    try:
        value, end = json.JSONDecoder().raw_decode(text) if text[:1] in ("{", "[") else (None, 0)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and text[end:].lstrip()[:1] in ("", "{", "[")


def is_foreign_utf8(stream: BinaryIO, encoding: str) -> bool:
    """Whether text that is to be read in another encoding is UTF-8, with characters that are read wrongly then: as far
    as the block in which the first of these stands."""
    if codecs.lookup(encoding).name == "utf-8":
        return False
    decoder, is_ascii = codecs.getincrementaldecoder("utf-8")(), True
    while is_ascii and (raw := stream.read(_BLOCK)):
        try:
            is_ascii = decoder.decode(raw).isascii()
        except UnicodeDecodeError:
            return False
    return not is_ascii


def _guess(raw: bytes) -> str | None:
    if raw[:2] in _UTF16_MARKS or raw.count(0) > len(raw) // 4:
        return "utf-16"
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", raw)]
    if 0 < sum(runs) < 2 * len(runs):  # letters with accents between plain ones
        return "cp1252" if re.search(rb"[\x80-\x9f]", raw) else "latin-1"
    for name in ("gb18030", "shift_jis"):
        text = raw.decode(name, "replace").rstrip("\N{REPLACEMENT CHARACTER}")  # which may end within a character
        foreign = [character for character in text if character > "\x7f"]
        if foreign and all("\u2000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in foreign):
            return name
    return None


def _text(stream: io.BufferedReader, encoding: str, newline: str | None) -> io.TextIOWrapper:
    """Decoded text. UTF-16 is told from its mark, or of a file without one from where its zeros are."""
    name, start = codecs.lookup(encoding).name, stream.peek(2)[:_SAMPLE]
    if name == "utf-8":
        encoding = "utf-8-sig"
    elif name.startswith("utf-16") and start[:2] in _UTF16_MARKS:
        encoding = "utf-16"
    elif name == "utf-16":
        encoding = "utf-16-le" if start[1::2].count(0) >= start[::2].count(0) else "utf-16-be"
    return io.TextIOWrapper(stream, encoding, newline=newline)


def _check_zeros(text: str, file: Path) -> None:
    """Raises UserError for text of which every second character is NUL: UTF-16 that was read as something else."""
    if text[:_SAMPLE].count("\0") > len(text[:_SAMPLE]) // 3:
        raise UserError(f"{file}: full of NUL bytes; {encoding_hint(bytes(1))}")


def undecodable(error: UnicodeError, file: Path, encoding: str) -> UserError:
    """What is wrong with text that is not in this encoding."""
    if codecs.lookup(encoding).name == "utf-8":
        raw = error.object if isinstance(error, UnicodeDecodeError) else b""
        return UserError(f"{file}: not UTF-8 text; {encoding_hint(raw[:_SAMPLE])}")
    return UserError(f"{file}: cannot be read as {encoding} ({error}); data.encoding names another encoding")


# JSON


def json_values(stream: BinaryIO, file: Path, encoding: str) -> Iterator[tuple[int | str, bytes | dict[str, str]]]:
    """(its line from 1, JSON text in UTF-8) of each value: of a line, or of an array or a series of pretty-printed
    ones; with its number among all, as in "1, record 2", where others stand in its line or the array begins there.

    Lines are told from the rest by the first that is not blank. Raises UserError for text that cannot be split.
    """
    if codecs.lookup(encoding).name == "utf-8":
        lines = _lines(stream.readline, file)
    else:
        text = _text(stream, encoding, "")
        lines = _lines(lambda limit: text.readline(limit).encode("utf-8", "surrogatepass"), file)
    filled = ((number, line) for number, line in lines if line.strip())
    begin = next(filled, None)
    if begin and _is_spread(begin[1]):
        yield from _spread_values(itertools.chain([begin], lines), file)
    elif begin:
        yield begin
        yield from filled


def _lines(readline: Callable[[int], bytes], file: Path) -> Iterator[tuple[int, bytes]]:
    for number in itertools.count(1):
        if not (raw := readline(MAX_LINE + 1)):
            return
        if len(raw) > MAX_LINE:
            raise UserError(f"{file}:{number}: longer than {MAX_LINE:,} bytes; expected one JSON object a line")
        yield number, raw.removeprefix(BOM)  # in any line: files with the mark are joined end to end


def _is_spread(first: bytes) -> bool:
    """Whether a file's first line is the beginning of an array of objects, or of an object that later lines end."""
    start = first.strip().decode("utf-8", "replace")
    if start[:1] == "[":
        return start[1:].lstrip()[:1] in ("", "{", "]") and not _is_conversation(start)
    if start[:1] != "{" or start[-1] not in "{[:,":
        return False
    try:
        json.loads(start)
    except (ValueError, RecursionError) as error:
        return getattr(error, "pos", 0) >= len(start)  # right so far, and more has to come
    return False


def _is_conversation(line: str) -> bool:
    """Whether a line is the list of a conversation's messages."""
    try:
        first, _ = json.JSONDecoder().raw_decode(line, line.index("{"))  # a large array is known by that alone
        return is_message(first) and are_messages(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _spread_values(
    lines: Iterator[tuple[int, bytes]], file: Path
) -> Iterator[tuple[int | str, bytes | dict[str, str]]]:
    """The elements of JSON arrays, or JSON values one after another, each with where it begins (see `json_values`)."""
    text = _TextAhead(lines, file)
    in_array, taken = False, 0  # the last line that something begins in
    while character := text.next_character():
        line, is_first, taken = text.line, text.line > taken, text.line
        if character == ("]" if in_array else "["):
            in_array = not in_array
            text.at += 1
        else:
            value = text.take_value()
            yield line if is_first else f"{line}, record {text.count}", value
    if in_array and not text.ends_broken:  # an error of the record that is not there: the others can be kept
        yield text.line, {_BROKEN: f"the file ends in the middle of a JSON array, behind record {text.count}: {_CUT}"}


class _TextAhead:
    """As much text of a file as is needed. at: place of the next character in it, which stands in line `line`.

    count: values taken. ends_broken: whether the last one was no JSON and the file ended with it.
    """

    _decoder = json.JSONDecoder()

    def __init__(self, lines: Iterator[tuple[int, bytes]], file: Path):
        self._lines, self._file = lines, file
        self.text, self.at, self.line = "", 0, 0
        self.count, self.ends_broken = 0, False

    def next_character(self) -> str:
        """The next one that is no space and no comma; empty at the end of the file."""
        while True:
            end = _SPACE.match(self.text, self.at).end()
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if not self._read(_BLOCK):
                return ""

    def take_value(self) -> bytes | dict[str, str]:
        """The JSON that begins here; what is to be said of a broken object that ends where the next begins, or with the
        file. Raises UserError for any other that is none, or longer than MAX_LINE."""
        indent = self.text[self.text.rfind("\n", 0, self.at) + 1 : self.at]
        self.count += 1
        while True:
            try:
                _, end = self._decoder.raw_decode(self.text, self.at)
                value = self.text[self.at : end].encode("utf-8", "surrogatepass")
                break
            except RecursionError as error:
                raise UserError(f"{self._file}:{self.line}: JSON nested too deeply") from error
            except ValueError as error:
                end, length = self._next_like_this(indent, error), len(self.text) - self.at
                if not end and length <= MAX_LINE and self._read(2 * length):
                    continue
                if not end and length <= MAX_LINE and self._is_last(indent, error):
                    end, self.ends_broken = len(self.text), True
                if not end:
                    raise UserError(f"{self._file}:{self.line}: {self._explain(error)}") from error
                value = {_BROKEN: self._explain(error)}
                break
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def _next_like_this(self, indent: str, error: ValueError) -> int | None:
        """Where the next object begins a line as the broken one here does; None if that is not ahead.

        Nested objects stand further in; where nothing is indented, only the next line counts.
        """
        is_cut_off = not self.text[getattr(error, "pos", 0) :].strip()  # so that more may mend it
        if self.text[self.at] != "{" or indent.strip() or is_cut_off:
            return None
        found = re.compile(rf"^{indent}\{{", re.MULTILINE).search(self.text, self.at + 1)
        if found and not indent and "\n" in self.text[self.at : found.start()].rstrip():
            return None
        return found and found.start()

    def _is_last(self, indent: str, error: ValueError) -> bool:
        """Whether no object can follow the broken one: it is cut off, or no later line begins as it does."""
        rest = self.text[getattr(error, "pos", 0) :]
        is_cut_off = "Unterminated string" in str(error) or not re.search(r'[][{}":,]', rest)
        is_followed = indent.strip() or re.search(rf"^{indent}\{{", self.text[self.at + 1 :], re.MULTILINE)
        return self.text[self.at] == "{" and (is_cut_off or not is_followed)

    def _explain(self, error: ValueError) -> str:
        if not isinstance(error, json.JSONDecodeError):
            return f"not readable JSON: {error}"
        line = self.line + self.text.count("\n", self.at, error.pos)
        return (
            f"the record that begins here is not JSON: {error.msg} in line {line} at column {error.colno}; expected a "
            f"JSON array of objects, or one object a line; {_CUT} (this is record {self.count} of the file)"
        )

    def _read(self, wanted: int) -> bool:
        """Reads on until `wanted` characters are ahead; whether there were more."""
        pieces, size = [self.text[self.at :]], len(self.text) - self.at
        for number, raw in self._lines:
            self.line = self.line or number
            try:
                pieces.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                if error.end == len(raw) and "unexpected end" in error.reason:  # the file is cut off in a character
                    pieces.append(raw[: error.start].decode("utf-8"))
                    break
                raise UserError(f"{self._file}:{number}: not UTF-8 text; {encoding_hint(raw)}") from error
            size += len(raw)
            if size >= wanted:
                break
        if len(pieces) == 1:
            return False
        self.text, self.at = "".join(pieces), 0
        return True


# Tables and documents


def csv_rows(stream: BinaryIO, file: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows under the header, each with the number of its last line. Raises UserError for text that is no CSV."""
    try:
        text = _text(stream, encoding, "")
        sample = (text.read(_SAMPLE) + text.readline()).removeprefix("\ufeff")
        _check_zeros(sample, file)
        first, _, rest = sample.partition("\n")
        line, skipped = first.strip('"\r\n'), 0
        separator = line[4:5] if line.lower().startswith("sep=") else ""  # a line of Excel's
        if separator:
            sample, skipped = rest, 1
        lines, separator = itertools.chain(io.StringIO(sample, newline=""), text), separator or _separator(sample, file)
        reader = csv.DictReader(lines, restkey=_EXTRA, restval=_MISSING, strict=True, delimiter=separator)
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = [name or f"Unnamed: {i}" for i, name in enumerate(names)] or None  # as pandas says
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise UserError(f"{file}:1: the header has the column {twice[0][:40]!r} twice; rename one")
        for row in reader:
            if any(row.values()):  # else one of Excel's, below the table
                yield reader.line_num + skipped, row
    except csv.Error as error:
        line_number = reader.reader.line_num + skipped
        raise UserError(f"{file}: not a readable CSV file: {error} (at line {line_number})") from error


def _separator(sample: str, file: Path) -> str:
    """What stands between columns: of the separators that split the header, the one by which most rows fit it."""
    if ".tsv" in [suffix.lower() for suffix in file.suffixes[-2:]]:
        return "\t"
    lines = io.StringIO(sample, newline="").readlines()[:200]
    best, most = ",", (0.0, 0)
    for separator in ",;\t|":
        try:
            rows = [row for row in csv.reader(lines, delimiter=separator) if row]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1:
            fits = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
            if (fits, len(rows[0])) > most:
                best, most = separator, (fits, len(rows[0]))
    return best


def check_row(row: dict[str, Any], where: str) -> None:
    """Raises UserError for a row of CSV that does not fit its header, and a broken element of an array."""
    if _BROKEN in row:
        raise UserError(f"{where}: {row[_BROKEN]}")
    if _EXTRA in row or _MISSING in row.values():
        raise UserError(
            f"{where}: {'more' if _EXTRA in row else 'fewer'} columns than the header has; text with separators or "
            "line ends stands in double quotes"
        )


def document(stream: BinaryIO, file: Path, encoding: str) -> str:
    """A whole file, with "\\n" at its line ends. Raises UserError for one that is longer than MAX_LINE."""
    text = _text(stream, encoding, None).read(MAX_LINE + 1)
    if len(text) > MAX_LINE:
        raise UserError(f"{file}: a document of more than {MAX_LINE:,} characters; split the file")
    _check_zeros(text, file)
    return text.removeprefix("\ufeff")
