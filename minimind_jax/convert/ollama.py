"""The Modelfile that `ollama create` reads beside a GGUF file: sampling, stops, and the chat template in Go's syntax.

ollama does not read the template in the GGUF file. Ours is written out; of a foreign one the turns are found by
rendering, without its tools and thinking.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.model.config import ModelConfig

_MARK = "# Written by minimind convert to-gguf; next: ollama create NAME -f Modelfile"
CONTEXT = 8192  # tokens that ollama reserves memory for, or the model's whole context
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}

# data/chat_template.jinja in Go's syntax. ollama finds the tags of thoughts and calls in it: the text at both ends of
# the block around .Thinking, and the first text behind `if .ToolCalls`.
_OURS = """\
{{ if or .System .Tools }}<|im_start|>system
{{ if .Tools }}{{ if .System }}{{ .System }}

{{ end }}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{ range .Tools }}{"type": "function", "function": {{ .Function }}}
{{ end }}</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{{ else }}{{ .System }}{{ end }}<|im_end|>
{{ end }}{{ $results := false }}{{ range .Messages }}{{ if and $results (ne .Role "tool") }}<|im_end|>
{{ $results = false }}{{ end }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "tool" }}{{ if not $results }}<|im_start|>user{{ end }}{{ $results = true }}
<tool_response>
{{ .Content }}
</tool_response>{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if true }}<think>
{{ .Thinking }}
</think>{{ end }}

{{ .Content }}{{ if .Content }}{{ with .ToolCalls }}
{{ end }}{{ end }}{{ $calls := .ToolCalls }}{{ if .ToolCalls }}{{ range $i, $call := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if gt (len (slice $calls $i)) 1 }}
{{ end }}{{ end }}{{ end }}<|im_end|>
{{ end }}{{ end }}{{ if $results }}<|im_end|>
{{ end }}<|im_start|>assistant
<think>
{{ if not (and .IsThinkSet .Think) }}
</think>

{{ end }}"""

_SYSTEM, _FIRST, _ANSWER, _SECOND, _THIRD = (f"zyx{word}probe" for word in ("s", "u", "a", "v", "w"))


def modelfile(
    gguf_names: list[str], config: ModelConfig, tokenizer: Tokenizer, generation: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The text of the Modelfile of GGUF files beside it, and what the user has to know of it.

    gguf_names: the model's, and its mmproj file's where it sees. generation: what generation_config.json holds.
    """
    template = _OURS if tokenizer.own_template else _go_template(tokenizer)
    notes = []
    if template is None:
        notes.append("Modelfile has no TEMPLATE: the chat template cannot be put in ollama's syntax; write one there")
    elif not tokenizer.own_template:
        notes.append("Modelfile: the chat template was put in ollama's syntax without its tools and thinking")
    words = {i: word for word, i in tokenizer.vocabulary().items()}
    stops = [words[i] for i in config.end_ids if i in words]
    if tokenizer.own_template:
        stops.append("<|im_start|>")
    sampling = {ours: generation[theirs] for theirs, ours in _PARAMETERS.items() if generation.get(theirs) is not None}
    if generation.get("do_sample") is False:
        sampling["temperature"] = 0
    lines = [
        *(f"FROM ./{name}" for name in gguf_names),
        *([] if template is None else [f'TEMPLATE """{template}"""']),
        *(f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)),
        *(f"PARAMETER {name} {value}" for name, value in sampling.items()),
        f"PARAMETER num_ctx {min(CONTEXT, config.max_position_embeddings)}",
    ]
    return _marked("\n".join(lines) + "\n"), notes


def _marked(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{_MARK} ({digest})\n{text}"


def is_as_written(text: str) -> bool:
    """Whether a Modelfile is one of ours that nobody has changed, or empty."""
    return not text or text == _marked(text.partition("\n")[2])


def _go_template(tokenizer: Tokenizer) -> str | None:
    """A foreign chat template's turns: what stands before, between and behind the messages. None where that is not all
    there is to it, as where it leaves out or rewrites what was said before."""
    system, first, second = ({"role": role, "content": text} for role, text in
                             (("system", _SYSTEM), ("user", _FIRST), ("user", _SECOND)))  # fmt: skip
    answer, third = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _THIRD}
    try:
        with_system, plain, longer = (
            "".join(segment.text for segment in tokenizer.prompt_segments(messages))
            for messages in ([system, first, answer, second], [first], [first, answer, second, answer, third])
        )
        opening, after_system, to_answer, to_user, end = _between(with_system, _SYSTEM, _FIRST, _ANSWER, _SECOND)
        start, _ = _between(plain, _FIRST)
    except (UserError, ValueError):
        return None
    turns = [start, _FIRST, to_answer, _ANSWER, to_user, _SECOND, to_answer, _ANSWER, to_user, _THIRD, end]
    pieces = (opening, after_system, to_answer, to_user, end, start)
    if "".join(turns) != longer or any("{{" in piece or '"""' in piece for piece in pieces):
        return None
    return (
        f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{after_system}{{{{ else }}}}{start}{{{{ end }}}}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{{{{ if $last }}}}{end}{{{{ else }}}}{to_answer}{{{{ end }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{{{{ if not $last }}}}{to_user}{{{{ end }}}}'
        "{{ end }}{{ end }}"
    )


def _between(text: str, *words: str) -> list[str]:
    """What stands before, between and behind the words. Raises ValueError where they are not there once, in order."""
    pieces = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError(word)
        before, text = text.split(word)
        pieces.append(before)
    return [*pieces, text]
