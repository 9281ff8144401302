"""Answers parted while they stream: tags in pieces, calls whole, the same message however the text arrives."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_jax.inference.splitter import AnswerSplitter, CallPart, Part, joined, parted

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "好"}}\n</tool_call>'
ADD = Part(call=CallPart("add", '{"a": 1, "b": "好"}'))
WORDS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<", "</", "tool", "_call>", "thi", "nk>"),
    *("a", " ", "\n", "\n\n", "好", "{", '{"name": "f", "arguments": {}}', CALL, "</tool_call", "<think"),
]


def split(pieces, **settings):
    splitter = AnswerSplitter(**settings)
    shown = [part for piece in pieces for part in splitter.push(piece)]
    return joined([*shown, *splitter.finish()])


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.booleans(), st.booleans(), st.data())
def test_how_text_is_cut_into_pieces_does_not_change_the_message(words, thinking, calls, data):
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = split([text], thinking=thinking, calls=calls)
    assert split(pieces, thinking=thinking, calls=calls) == whole
    assert split(text, thinking=thinking, calls=calls) == whole  # letter by letter


@given(st.text(st.characters(exclude_characters="<"), max_size=30))
def test_words_without_tags_are_given_as_they_are(text):
    assert "".join(part.content for part in split(text)) == text
    assert "".join(part.content for part in split(text, calls=True)) == text


@pytest.mark.parametrize(
    "text, settings, parts",
    [
        ("so\n</think>\n\nYes.\n", {"thinking": True}, [Part("so"), Part(content="Yes.\n")]),
        ("<think>\nhm\n</think>\nNo <b.", {}, [Part("hm"), Part(content="No <b.")]),
        ("\nplain ", {}, [Part(content="\nplain ")]),
        ("cut </thi", {"thinking": True}, [Part("cut </thi")]),
        (f"Well.\n{CALL}", {"calls": True}, [Part(content="Well."), ADD]),
        (f"\n{CALL}\n{CALL}\n", {"calls": True}, [ADD, ADD]),
        (f"{CALL}\nDone.", {"calls": True}, [ADD, Part(content="Done.")]),
        (CALL, {}, [Part(content=CALL)]),
        (CALL.removesuffix("</tool_call>"), {"calls": True}, [ADD]),
        ('<tool_call>{"name": "ad', {"calls": True}, [Part(content='<tool_call>{"name": "ad')]),
        ("a\n<tool_call>no</tool_call> b", {"calls": True}, [Part(content="a\n<tool_call>no</tool_call> b")]),
        ("a \n", {"calls": True}, [Part(content="a \n")]),
        (f"a<think>{CALL}</think>b", {"calls": True}, [Part(content="a"), Part(CALL), Part(content="b")]),
    ],
)
def test_what_is_thinking_words_and_calls(text, settings, parts):
    assert split(text, **settings) == parts
    if not settings.get("calls"):
        words = (part.content for part in parts)
        assert parted(text, **{"thinking": False, **settings}) == (parts[0].reasoning, "".join(words), None)


@pytest.mark.parametrize("text", ["<think> </think>", "</tool_call>", '"</tool_call>\\" <tool_call>{}\n'])
def test_a_tag_inside_an_argument_is_no_tag(text):
    call = f"<tool_call>{json.dumps({'name': 'f', 'arguments': {'text': text}})}</tool_call>"
    for pieces in ([call * 2], call * 2):
        parts = split(pieces, calls=True)
        assert [json.loads(part.call.arguments) for part in parts] == [{"text": text}] * 2


def test_a_string_that_is_never_closed_ends_with_its_line():
    broken = '<tool_call>{"name": "f\n</tool_call>'
    assert split(f"{broken}{CALL}", calls=True) == [Part(content=broken), ADD]


def test_what_cannot_become_a_tag_is_shown_at_once():
    splitter = AnswerSplitter(calls=True)
    assert splitter.push("a <t") == [Part(content="a")]
    assert splitter.push("able") == [Part(content=" <table")]
    assert splitter.push("<tool_c") == []
    assert splitter.push("all>") == []
    assert splitter.push('{"name": "f", "arguments": {}}') == []
    assert splitter.push("</tool_call>") == [Part(call=CallPart("f", "{}"))]
