"""The text of one answer as its tokens arrive: whole characters, and nothing at or after a stop string."""

from collections.abc import Iterable

from minimind_jax.data.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """Turns tokens into text that is final: what is given out is never taken back.

    Text that may be the start of a stop string is held back until it is not.

    stopped: a stop string was completed. text: all that was given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = (), skip_special_tokens: bool = True):
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        self.text = ""

    def push(self, token_id: int) -> str:
        """The text that became final with this token."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest: no more tokens come."""
        piece = self._release(self._decoder.flush())
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [start for start in (held.find(stop) for stop in self._stop) if start >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(held) - _possible_start(held, self._stop)
        self._held = held[end:]
        self.text += held[:end]
        return held[:end]


def _possible_start(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
