"""Episodes for people to read: as a page of Markdown, and in the terminal."""

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from minimind_jax.data.inspect import pieces_of, print_legend, printable, styled
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.rl.episode import Episode, Turn
from minimind_jax.texts import fenced
from minimind_jax.training.run import write_text

LONGEST = 300  # characters of a line on a call or a result


class Part(NamedTuple):
    """The prompt, a turn, or what it was told. pieces: its text, and whether it is trained. notes: lines on it."""

    title: str
    pieces: list[tuple[str, bool]]
    notes: list[str]


def write_page(path: Path, episodes: Sequence[Episode], tokenizer: Tokenizer) -> None:
    """Replaces `path` by a page of Markdown of the episodes, in their order; trained tokens stand in ⟦⟧.

    Whatever the policy, a record or a tool wrote is in fenced blocks, with control characters spelled out. Raises
    UserError when it cannot be written.
    """
    rewards = [episode.reward for episode in episodes]
    spread = f", rewards of {min(rewards):.4g} to {max(rewards):.4g}" if rewards else ""
    mean = f", {statistics.fmean(rewards):.4g} on average" if rewards else ""
    sections = [f"# {len(episodes)} episodes{spread}{mean}", "What is trained stands between ⟦ and ⟧."]
    for number, episode in enumerate(episodes, 1):
        sections += [f"## {number}. {_title(episode)}", fenced("\n".join(_facts(episode)))]
        for part in parts(episode, tokenizer):
            sections += [f"### {part.title}", fenced(styled(part.pieces).plain)]
            sections += [fenced("\n".join(part.notes))] if part.notes else []
    write_text(path, "\n\n".join(sections) + "\n")


def show(episode: Episode, tokenizer: Tokenizer, console: Console) -> None:
    """The episode in the terminal, its trained tokens coloured, or in ⟦⟧ where there are no colours."""
    console.rule(Text(_title(episode), "bold"), align="left")
    console.print(Text("\n".join(_facts(episode))), soft_wrap=True)
    for part in parts(episode, tokenizer):
        console.rule(Text(part.title), align="left", style="dim")
        console.print(styled(part.pieces, console), soft_wrap=True)
        if part.notes:
            console.print(Text("\n".join(part.notes), "italic"), soft_wrap=True)
    print_legend(console)


def parts(episode: Episode, tokenizer: Tokenizer) -> list[Part]:
    """All tokens of an episode, in order: its prompt, and each turn with what came of it."""
    ends = [episode.prompt, *itertools.chain.from_iterable((turn.start, turn.end) for turn in episode.turns)]
    found = []
    for n, (start, end) in enumerate(itertools.pairwise([0, *ends, len(episode.tokens)])):
        turn = episode.turns[n // 2 - 1] if n and n % 2 == 0 else None
        if start < end or turn:
            title = f"Turn {n // 2}" if turn else "Told" if n else "Prompt"
            ids, sampled = np.array(episode.tokens[start:end], int), np.array(episode.sampled[start:end], bool)
            pieces = pieces_of(tokenizer, ids, sampled)
            count = f"{end - start:,} tokens" + (f", {turn.finish}" if turn else "")
            found.append(Part(f"{title} ({count})", pieces, list(_notes(turn)) if turn else []))
    return found


def _notes(turn: Turn) -> Iterator[str]:
    """Each call, and what came of it."""
    for call, seen in itertools.zip_longest(turn.calls, turn.observations):
        if call:
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            yield _line(f"broken call: {call.error}" if call.error else f"call: {call.name} {arguments}")
        if seen:
            yield _line(f"{'error' if seen.is_error else 'result'}: {seen.text}")


def _facts(episode: Episode) -> list[str]:
    observed = len(episode.completion) - (sampled := sum(episode.sampled))
    thinking = ", thinks first" if episode.thinking else ""
    rewards = {f"  {name}": value for name, value in episode.rewards.items()} | {"reward": episode.reward}
    wide = max(map(len, rewards))
    return [
        _line(f"{episode.task.where}{thinking}"),
        f"{episode.prompt:,} tokens of prompt, {sampled:,} sampled, {observed:,} observed",
        *(_line(f"{name:<{wide}}  {'has nothing to say' if v is None else f'{v:.4f}'}") for name, v in rewards.items()),
    ]


def _title(episode: Episode) -> str:
    return f"Prompt {episode.group}, reward {episode.reward:.4f}, ended by {episode.finish or 'nothing yet'}"


def _line(text: str) -> str:
    """One line, the end of a long one left out: the tokens have all of it."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"
    return printable(text.replace("\n", "\\n")).encode("utf-8", "backslashreplace").decode()
