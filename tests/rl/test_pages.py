"""Episodes as people read them."""

import io

import pytest
from rich.console import Console

from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.data.tools import parse_calls
from minimind_jax.rl.episode import Episode, Task, Turn
from minimind_jax.rl.pages import show, write_page
from minimind_jax.tools.toolbox import Observation

CALL = '<tool_call>\n{"name": "add", "arguments": {"x": "1"}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe([CALL, "What is 1 + 1? It is 2."], tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


def episode(tokenizer, *pieces, rewards=(("answer", 1.0), ("judge", None)), where="asked.jsonl, line 3"):
    """An episode of a prompt, and then turns and what they were told, in turn."""
    tokens, sampled, turns, bounds = [], [], [], []
    for n, piece in enumerate(pieces):
        ids = tokenizer.encode(piece)
        bounds.append((len(tokens), len(tokens) + len(ids)))
        tokens += ids
        sampled += [n % 2 == 1] * len(ids)
    for n in range(1, len(pieces), 2):
        answer, calls = parse_calls(pieces[n].removesuffix("<|im_end|>"))
        told = tuple(Observation(pieces[n + 1], call.error != "") for call in calls) if n + 1 < len(pieces) else ()
        turns.append(Turn(pieces[n], answer, tuple(calls), told, *bounds[n], "stop"))
    task = Task(where, [], None, {"gt": ["2"]})
    total = sum(value or 0 for _, value in rewards)
    return Episode(
        7, task, False, tokens, bounds[0][1], sampled, [0.0] * len(tokens), turns, "stop", dict(rewards), total
    )  # fmt: skip


def shown(found, tokenizer, colours=False):
    console = Console(
        file=io.StringIO(), width=100, force_terminal=colours, color_system="standard" if colours else None
    )
    show(found, tokenizer, console)
    return console.file.getvalue()


def page(tmp_path, found, tokenizer):
    write_page(tmp_path / "page.md", found, tokenizer)
    return (tmp_path / "page.md").read_text("utf-8")


def outside_of_fences(text):
    """The lines that Markdown reads: a fence closes with as many ticks as opened it, or more."""
    lines, fence = [], ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if len(ticks) >= len(fence) and line == ticks else fence
        elif len(ticks) >= 3:
            fence = ticks
        else:
            lines.append(line)
    assert not fence
    return lines


def test_a_page_has_all_of_an_episode(tmp_path, tokenizer):
    found = episode(tokenizer, "What is 1 + 1?", CALL, '\n{"result": "2"}', "It is 2.<|im_end|>")
    text = page(tmp_path, [found, found], tokenizer)
    assert text.startswith("# 2 episodes, rewards of 1 to 1, 1 on average\n")
    assert "## 2. Prompt 7, reward 1.0000, ended by stop" in text
    assert "asked.jsonl, line 3" in text
    assert f"⟦{CALL}⟧" in text and "⟦It is 2.<|im_end|>⟧" in text
    assert "⟦What" not in text and '⟦\n{"result"' not in text and "What is 1 + 1?" in text
    assert 'call: add {"x": "1"}' in text and 'result: \\n{"result": "2"}' in text
    assert "answer  1.0000" in text and "judge   has nothing to say" in text
    sampled = sum(found.sampled)
    assert f"{found.prompt} tokens of prompt, {sampled} sampled, {len(found.completion) - sampled} observed" in text
    assert [line for line in outside_of_fences(text) if line.startswith("### ")][:4] == [
        f"### Prompt ({found.prompt} tokens)",
        f"### Turn 1 ({len(tokenizer.encode(CALL))} tokens, stop)",
        f"### Told ({len(tokenizer.encode(found.turns[0].observations[0].text))} tokens)",
        f"### Turn 2 ({len(tokenizer.encode('It is 2.<|im_end|>'))} tokens, stop)",
    ]


def test_the_mask_is_what_is_marked_not_the_turns(tmp_path, tokenizer):
    found = episode(tokenizer, "What?", "It is 2.<|im_end|>")
    found.sampled[-1] = False
    assert "⟦It is 2.⟧<|im_end|>" in page(tmp_path, [found], tokenizer)


def test_the_terminal_shows_trained_tokens_in_colour(tokenizer):
    found = episode(tokenizer, "What is 1 + 1?", CALL, "2", "It is 2.<|im_end|>")
    text = shown(found, tokenizer, colours=True)
    assert "\x1b[1;32mIt is 2.<|im_end|>\x1b[0m" in text and "\x1b[2mWhat is 1 + 1?\x1b[0m" in text
    assert "⟦" not in text
    plain = shown(found, tokenizer)
    assert "⟦It is 2.<|im_end|>⟧" in plain and "\x1b" not in plain
    assert "judge   has nothing to say" in plain and "answer  1.0000" in plain


HOSTILE = "[red]no[/red] [/] :smile: \x1b[2J\x9b\r\u202e ⟦not trained⟧\n```\n# Heading\n````\n<script>"


@pytest.mark.parametrize("place", range(4))
def test_what_others_wrote_is_harmless_wherever_it_stands(tmp_path, tokenizer, place):
    pieces = ["What?", CALL, "2", "It is 2.<|im_end|>"]
    pieces[place] = HOSTILE
    found = episode(tokenizer, *pieces, where=f"{HOSTILE}, line 1")
    found.rewards[HOSTILE] = 0.5
    text = page(tmp_path, [found], tokenizer)
    headings = [line for line in outside_of_fences(text) if line.startswith("#")]
    assert [line.split()[0] for line in headings] == ["#", "##", *["###"] * 4]
    assert not any("script" in line or "Heading" in line for line in outside_of_fences(text))
    for told in (text, shown(found, tokenizer)):
        assert not set(told) & set("\x1b\x9b\r\u202e")
        assert "[red]no[/red] [/] :smile: \\x1b[2J\\x9b\\x0d\\u202e \\u27e6not trained\\u27e7" in told
        assert told.count("⟦") == told.count("⟧")


def test_an_episode_that_never_began_and_broken_calls(tmp_path, tokenizer):
    silent = episode(tokenizer, "What?", rewards=())
    silent.finish = "error"
    assert "reward 0.0000, ended by error" in page(tmp_path, [silent], tokenizer)
    assert "0 episodes" in page(tmp_path, [], tokenizer)
    broken = episode(tokenizer, "What?", '<tool_call>{"name": 1}</tool_call>', "no such call" * 100)
    notes = shown(broken, tokenizer)
    assert "broken call: tool_call[0]: missing field `name`" in notes
    assert "error: no such call" in notes and "… (1,207 characters)" in notes


def test_a_character_in_several_tokens_is_not_lost(tokenizer):
    found = episode(tokenizer, "问", "好的<|im_end|>")
    assert "⟦好的<|im_end|>⟧" in shown(found, tokenizer)
