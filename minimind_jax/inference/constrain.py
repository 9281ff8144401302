"""Answers that cannot be anything but what was asked for: JSON, a schema, a pattern, a choice, calls of tools.

llguidance says before each token which may come; `grammar.py` tells it what the answer must be.
"""

import functools
import json
import random
import threading
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError, first_line
from minimind_jax.inference.grammar import OPEN_CALL, SPECIAL, Form, limits, llguidance, whole
from minimind_jax.inference.request import Busy
from minimind_jax.tools.toolbox import Toolbox

_TRY_SECONDS, _TRY_MIB = 3.0, 512
_NEAR, _FARTHEST = 256, 1024  # tokens to an end that is looked for; other answers wait meanwhile
_FORCED = 128  # characters of a text that must come, of which the tokens are asked for at a time
_AT_ONCE, _WAIT_SECONDS = 4, 1.0  # so that hostile grammars leave threads to those who ask for none


class Grammars:
    """Makes what binds an answer, for one tokenizer; built once, used by any thread.

    vocab_size: of the model, where it has more rows than the tokenizer has words. end_ids: tokens that end an answer;
    None for those of the tokenizer. Those that the vocabulary does not have are left out.

    Raises UserError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, end_ids: Iterable[int] | None = None):
        self._library, self._vocabulary = llguidance(), tokenizer.vocabulary()
        size = max(vocab_size or 0, tokenizer.vocab_size)
        ends = tuple(i for i in (tokenizer.end_ids if end_ids is None else end_ids) if i < size)
        self._words = _Words(tokenizer, size, ends or (tokenizer.eos_id,))
        self._tokens = self._library.LLTokenizer(
            self._library.TokenizerWrapper(self._words), eos_token=list(self._words.end_ids)
        )
        self._words.spell = self._tokens.greedy_tokenize
        self._steps = _Steps(self._words)
        self._lock, self._turns = threading.Lock(), threading.Semaphore(_AT_ONCE)
        self._trials: Toolbox | None = None

    def constraint(
        self,
        form: Form,
        limit: int | None = None,
        thinking: Literal["no", "open", "may"] = "no",
        where: str = "the grammar",
    ) -> "GrammarConstraint":
        """What binds one answer to `form`.

        limit: tokens that the answer may have; it is brought to an end within them where that is possible. thinking:
        whether the prompt ends in an open think block, or the answer may begin with one: the form holds behind it.
        where: that the form comes from, for the message. Raises UserError for a grammar that is wrong, not supported,
        or takes too much time or memory; Busy where too many others are tried at the moment.
        """
        text = whole(form, self.tag, thinking)
        if fault := self._fault(text):
            raise UserError(f"{where}: {fault}")
        matcher = self._matcher(text)
        if matcher.is_error():
            raise UserError(f"{where}: {_said(matcher.get_error())}")
        opener = self.tag(OPEN_CALL) if form.calls else None
        return GrammarConstraint(matcher.deep_copy(), self._steps, form, limit, opener)

    def tag(self, text: str) -> int | None:
        """The token that a tag is, or None where it is spelled."""
        token = self._vocabulary.get(text)
        return token if token in self._words.marks else None

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as its model
    def _matcher(self, text: str) -> Any:
        """A grammar's own matcher, to be copied for each answer: a large one takes a while."""
        matcher = self._library.LLMatcher(self._tokens, text, limits=limits(), log_level=0)
        matcher.compute_bitmask()
        return matcher

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _fault(self, text: str) -> str:
        """What is wrong with a grammar, tried where it can neither hang nor take the memory of this process."""
        with self._lock:
            self._trials = self._trials or Toolbox(
                ("minimind_jax.inference.grammar:tried",), seconds=_TRY_SECONDS, memory_mib=_TRY_MIB, workers=2
            )
        if not self._turns.acquire(timeout=_WAIT_SECONDS):
            raise Busy("too many forms of answers are being tried; ask again soon")
        try:
            return self._tried(text)
        finally:
            self._turns.release()

    def _tried(self, text: str) -> str:
        pieces = self._words.pieces
        named = ((i, pieces[i].decode("utf-8", "replace")) for i in sorted(self._words.marks))
        marks = [mark for mark in named if str(mark[0]) in text or mark[1] in text]
        told = self._trials.call("tried", {"grammar": text, "size": len(pieces), "marks": marks})
        if told.is_error:
            return f"too large, too deep or too costly to follow ({json.loads(told.text)['error']}); make it simpler"
        return _said(told.text) if told.text else ""

    def close(self) -> None:
        """Ends the processes in which grammars are tried."""
        if self._trials:
            self._trials.close()


def _said(error: str) -> str:
    """llguidance's words without the grammar that it repeats; of a pattern, which it is and why."""
    line, lines = first_line(Exception(error))[:300], [line.strip() for line in error.splitlines()]
    if line == "regex parse error:":
        why = next((line for line in lines if line.startswith("error: ")), "")
        return f"the pattern {lines[1][:200]}: {why.removeprefix('error: ')}"
    return "no text fits" if line.startswith("NoExtension") else line


class _Words:
    """A tokenizer as llguidance asks for it. Tokens that are no words, such as <|im_start|>, are no text to it."""

    bos_token_id, special_token_ids = None, ()

    def __init__(self, tokenizer: Tokenizer, size: int, end_ids: tuple[int, ...]):
        self.end_ids, self.eos_token_id = end_ids, end_ids[0]
        self.marks = tokenizer.mark_ids | {*end_ids}
        self.pieces = tokenizer.byte_pieces + [b""] * (size - tokenizer.vocab_size)
        self.tokens = [SPECIAL + piece if i in self.marks else piece for i, piece in enumerate(self.pieces)]
        self.spell = lambda text: []
        self._encode = tokenizer.encode

    def __call__(self, data: bytes) -> list[int]:
        """The first tokens of the text that must come next. A long one would be encoded anew, whole, at each step."""
        text = data.decode()[:_FORCED]
        ids, data = self._encode(text), text.encode()
        if self.marks.isdisjoint(ids) and b"".join(self.pieces[i] for i in ids) == data:
            return ids
        return self.spell(text)  # a tag in plain letters, or a tokenizer that puts a blank in front


class GrammarConstraint:
    """Binds one answer, token by token (a `Constraint`).

    Near its limit an answer is steered to its end: strings, lists and objects are closed, thinking ends, and no call
    begins that there is no room for. Words that may end anywhere are let be.

    cut: it was ended so. notes: what the grammar leaves out of its form. Its methods raise UserError where a grammar
    takes too much to be followed any further.
    """

    def __init__(self, matcher: Any, steps: "_Steps", form: Form, limit: int | None, opener: int | None):
        self._matcher, self._steps, self._opener = matcher, steps, opener
        self._left = self._look_at = limit or 0  # tokens; an end is looked for when so many are left
        self._limit, self._steers = limit, not form.is_free
        self._plan: list[int] = []
        self._longest = 0  # of the ways to an end so far
        self._tail = b""
        self._call_length: int | None = None
        self.cut = False
        self.notes: list[str] = [*form.notes, *matcher.get_grammar_warnings()]

    def mask(self) -> np.ndarray:
        """uint32 (ceil(V / 32),), bit i % 32 of word i // 32: the tokens that may come next."""
        if self._limit is not None and self._steers and not self._plan and self._left <= self._look_at:
            self._look()
        if self._plan:
            return self._steps.only(self._plan[0])
        mask = self._steps.mask(self._matcher)
        self._check()
        if self._limit is not None and self._lacks_room_for_call(mask):
            mask = mask & ~self._steps.only(self._opener)
        return mask

    def accept(self, token: int) -> None:
        """The next token is this one."""
        self._left -= 1
        if not self._steers:
            self._tail = (self._tail + self._steps.pieces[token])[-2 * len(OPEN_CALL) :]
            self._steers = OPEN_CALL.encode() in self._tail
        self.cut = self.cut or bool(self._plan)
        self._plan = self._plan[1:]
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        """Nothing but an end may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the form cannot be followed any further: {_said(self._matcher.get_error())}")

    def _look(self) -> None:
        """Takes the way to an end if there is just room for it; else says when to look again.

        A token may lengthen the way, mostly by what closes again the bracket that it opens: half of the room to spare
        may be used before the next look.
        """
        way = self._steps.way_out(self._matcher, self._left)
        spare = self._left - self._reserve(way)
        if way and spare <= 0:
            self._plan = way
        self._look_at = self._left - max(1, spare // 2)

    def _lacks_room_for_call(self, mask: np.ndarray) -> bool:
        """Whether a call may begin here, need not, and would not come to its end."""
        if self._opener is None or not has(mask, self._opener) or not any(has(mask, end) for end in self._steps.ends):
            return False
        if self._call_length is None:
            matcher = self._matcher.deep_copy()
            matcher.consume_token(self._opener)
            self._call_length = self._reserve(self._steps.way_out(matcher, self._left))
        return self._left <= self._call_length

    def _reserve(self, way: list[int]) -> int:
        """Tokens to keep for a way out: its length, and some for a token that makes it longer by more than one, such as
        one that begins another object with all that it must hold."""
        self._longest = max(self._longest, len(way))
        return len(way) + min(12 + self._longest, self._limit // 3)


def has(mask: np.ndarray, token: int) -> bool:
    """Whether a mask allows a token."""
    return bool(mask[token // 32] >> token % 32 & 1)


class _Steps:
    """Which token brings JSON to its end soonest."""

    def __init__(self, words: _Words):
        self.pieces, self.ends, self._marks = words.pieces, frozenset(words.end_ids), words.marks
        self._singles = {piece: i for i, piece in enumerate(words.pieces) if len(piece) == 1 and i not in words.marks}
        self._quote = self._singles.get(b'"')
        self._brackets = [self._singles[piece] for piece in (b"}", b"]") if piece in self._singles]
        self._plain = {i for piece, i in self._singles.items() if piece.isascii() and piece not in (b"{", b"[")}
        self._signs = {i for i in self._plain if not self.pieces[i].isalnum()}
        self._width = -(-len(words.pieces) // 32)

    def mask(self, matcher: Any) -> np.ndarray:
        return np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._width]

    def only(self, token: int) -> np.ndarray:
        mask = np.zeros(self._width, np.uint32)
        mask[token // 32] = 1 << token % 32
        return mask

    def way_out(self, matcher: Any, most: int) -> list[int]:
        """Tokens from here to an end, end-of-text included; none if no end was found within `most`, or far."""
        start, matcher, rng, way = matcher, matcher.deep_copy(), random.Random(0), []
        before = tried = frozenset(self._singles.values())
        while len(way) < min(max(most, _NEAR), _FARTHEST) and not matcher.is_stopped():
            mask = self.mask(matcher)
            singles = {token for token in self._singles.values() if has(mask, token)}
            way.append(self._next(mask, singles, before, tried, rng))
            matcher.consume_token(way[-1])
            before, tried = singles, {*way[-64:]}
        for place in reversed(range(len(way) - 1) if len(way) <= _NEAR else ()):  # what was tried in vain is left out
            shorter = way[:place] + way[place + 1 :]
            way = shorter if self._ends(start, shorter) else way
        return way if len(way) <= most and self._ends(start, way) else []

    def _ends(self, matcher: Any, way: list[int]) -> bool:
        matcher = matcher.deep_copy()
        return matcher.try_consume_tokens(way) == len(way) and matcher.is_stopped()

    def _next(self, mask: np.ndarray, singles: set[int], before: set[int], tried: set[int], rng: random.Random) -> int:
        """singles: allowed tokens of one byte; before: those a step earlier. tried: on the way."""
        if found := [token for tokens in (self.ends, self._marks) for token in tokens if has(mask, token)]:
            return found[0]
        if 0 < len(closing := [token for token in self._brackets if token in singles]) < len(self._brackets):
            return closing[0]  # in a string all brackets may come, and end nothing
        if self._quote in singles:
            return self._quote
        # Out of a repetition leads what has just become possible, or what is no letter; what opens a bracket leads in.
        singles = singles & self._plain or singles or {*tokens_of(mask)}
        ranks = singles - before, singles & self._signs - tried, singles - tried, singles
        return rng.choice(sorted(next(filter(None, ranks))))


def tokens_of(mask: np.ndarray) -> list[int]:
    """The tokens that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
