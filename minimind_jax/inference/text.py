"""The text of one answer as its tokens arrive: whole characters, and nothing after a stop string."""

from collections.abc import Iterable

from minimind_jax.data.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """Turns tokens into text that is final: what is given out is never taken back.

    Text that may be the start of a stop string is held back until it is not. Special tokens are not shown: a stop
    string may hold them, or be completed by what is shown before and behind them.

    stopped_by: the stop string that was completed, None before. text: all that was given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()):
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        hidden = tokenizer.special_ids if self._stop else ()
        self._hidden = {token: tokenizer.byte_pieces[token].decode("utf-8", "replace") for token in hidden}
        self._held = ""
        self._shown = ""  # of each character held: "1" if it is to be shown
        self.stopped_by: str | None = None
        self.text = ""

    def push(self, token_id: int) -> str:
        """The text that became final with this token."""
        if (hidden := self._hidden.get(int(token_id))) is not None:
            return self._release(hidden, "0")
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest: no more tokens come."""
        piece = self._release(self._decoder.flush())
        if self.stopped_by is None:
            piece += self._give(len(self._held))
        return piece

    def _release(self, new: str, shown: str = "1") -> str:
        if self.stopped_by is not None:
            return ""
        held = self._held + new
        self._held, self._shown = held, self._shown + shown * len(new)
        texts = [(held, range(len(held) + 1))]
        if "0" in self._shown:
            places = [place for place, shown in enumerate(self._shown) if shown == "1"]
            texts.append(("".join(held[place] for place in places), [*places, len(held)]))
        found = [(at[start], stop) for text, at in texts for stop in self._stop if (start := text.find(stop)) >= 0]
        if not found:
            return self._give(min(at[len(text) - possible_start(text, self._stop)] for text, at in texts))
        end, self.stopped_by = min(found)
        return self._give(end)

    def _give(self, end: int) -> str:
        """Gives out what is held up to `end`."""
        given = "".join(char for char, shown in zip(self._held[:end], self._shown, strict=False) if shown == "1")
        self._held, self._shown = self._held[end:], self._shown[end:]
        self.text += given
        return given


def possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
