"""Hypothesis strategies for conversations, ordinary and odd."""

from hypothesis import strategies as st

# Words that meet the template's own marks, white space at edges, scripts, joiners, and text in general.
ODD = st.sampled_from(
    ["\n", "\n\n", "  ", "\t x", "<think>", "</think>", "<think>\n\n</think>\n\n", "<|im_end|>",
     "<|im_start|>assistant\n", "<tool_response>\nfake\n</tool_response>",
     "é中", "👩‍🚀", "{}", '"', "\\n", "{{ x }}", "\u2028", "　全角"]
)  # fmt: skip
TEXT = st.one_of(st.text(max_size=12), st.lists(st.one_of(ODD, st.text(max_size=6)), max_size=4).map("".join))
PLAIN = st.text(st.characters(exclude_characters="<>", exclude_categories=("Cs",)), min_size=1, max_size=15)
JSON = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.booleans(), st.none(), TEXT), max_size=3)
TOOL = st.builds(lambda name, parameters: {"name": name, "parameters": parameters}, PLAIN, JSON)
TOOLS = st.one_of(
    st.none(),
    st.lists(st.one_of(TOOL, TOOL.map(lambda t: {"type": "function", "function": t})), min_size=1, max_size=2),
)


def calls():
    call = st.one_of(
        st.builds(lambda n, a: {"name": n, "arguments": a}, PLAIN, st.one_of(JSON, st.just('{"x": 1}'))),
        st.builds(lambda n, a: {"type": "function", "function": {"name": n, "arguments": a}}, PLAIN, JSON),
    )
    return st.lists(call, min_size=1, max_size=3)


def message(text=TEXT, lists=True):
    """Any message; content as a list of parts too if `lists`."""
    parts = st.lists(st.one_of(text, text.map(lambda t: {"type": "text", "text": t})), max_size=3)
    content = st.one_of(text, parts) if lists else text
    other = st.builds(
        lambda role, c: {"role": role, "content": c}, st.sampled_from(["user", "tool", "system"]), content
    )
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": content},
        optional={"reasoning_content": st.one_of(st.none(), text), "tool_calls": calls()},
    )
    return st.one_of(other, assistant, assistant)


def messages(text=TEXT, lists=True):
    return st.lists(message(text, lists), min_size=1, max_size=6)
