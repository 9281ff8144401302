"""Settings of everything that generates text; no heavy imports, so that `--help` answers at once."""

import dataclasses
import re
from typing import Literal

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.rules import TEMPERATURE, TOP_P, Rule, Settings, at_least, setting

# What a model's generation_config.json decides where the user does not.
FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

PENALTY = Rule(lambda value: -2 <= value <= 2, "between -2 and 2 (0 is off)")  # OpenAI's bounds


@dataclasses.dataclass(frozen=True)
class SamplingSettings(Settings):
    """How text is generated, as a user says it; what is null is the model's (see `resolve`).

    max_new_tokens: at most so many are generated for a prompt. null: 512, or what the prompt leaves of the model's
        context if that is less.
    temperature: the logits are divided by it; 0 always takes the likeliest token (greedy). null: as the model's
        generation_config.json says (0 for do_sample false), or 0.85.
    top_k: only the k likeliest tokens may be drawn; 0 for all. null: generation_config.json, or 0.
    top_p: only the likeliest tokens that together reach this probability, the one that crosses it included; 1 for all.
        null: generation_config.json, or 0.95.
    min_p: only tokens at least min_p times as likely as the likeliest; 0 for all. null: generation_config.json, or 0.
    repetition_penalty: positive logits of tokens already in the prompt or the answer are divided by it, negative ones
        multiplied (arXiv 1909.05858); 1 for none. null: generation_config.json, or 1.
    presence_penalty: taken off the logits of tokens that are in the answer already; below 0 they are favoured.
    frequency_penalty: taken off them once for each time they are in the answer.
    stop: generation ends before the first of these strings, which may be special tokens such as <|im_end|>; a shell's
        \\n, \\t and \\r mean a line break, a tab and a carriage return, two backslashes one.
    ignore_eos: go on after an end-of-text token.
    seed: of the draws. The n-th prompt of a call draws with seed + n, so a batch gives what its prompts give alone.
    """

    max_new_tokens: int | None = setting(None, must=at_least(1))
    temperature: float | None = setting(None, must=TEMPERATURE)
    top_k: int | None = setting(None, must=Rule(lambda count: count >= 0, "0 (off) or above"))
    top_p: float | None = setting(None, must=TOP_P)
    min_p: float | None = setting(None, must=Rule(lambda share: 0 <= share <= 1, "between 0 (off) and 1"))
    repetition_penalty: float | None = setting(None, must=Rule(lambda value: value > 0, "above 0 (1 is off)"))
    presence_penalty: float = setting(0.0, must=PENALTY)
    frequency_penalty: float = setting(0.0, must=PENALTY)
    stop: tuple[str, ...] = setting((), is_text=True, must=Rule(all, "strings that are not empty"))
    ignore_eos: bool = False
    seed: int = setting(0, must=Rule(lambda seed: -(2**63) <= seed < 2**63, "between -2**63 and 2**63 - 1"))

    def __post_init__(self):
        _set_texts(self, "stop")
        super().__post_init__()

    def resolve(self, model: "SamplingConfig") -> "SamplingConfig":
        """How to sample: as these settings say, and as `model`'s own say where they are null."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingConfig)}
        own["stop"] = tuple(map(_unescaped, self.stop))
        return dataclasses.replace(model, **{name: value for name, value in own.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplingSettings):
    """The same with a value for every field: what a generator samples with."""

    max_new_tokens: int = 512
    temperature: float = 0.85
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingSettings):
    """A conversation with a model in the terminal.

    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    adapters: low-rank adapters of the model, folders or runs; the first answers, /adapter NAME chooses another.
    system: the system prompt; empty for none.
    tools: what the model may call: calculator, time, units, random, text, all of these, or functions of your own as
        module:function or FILE.py:function (docs/tools.md).
    tool_rounds: calls, results and the next words are at most so many rounds of an answer.
    thinking: let the model think before it answers; /think and /nothink switch it.
    show_speed: a line with tokens per second and the time to the first token after each answer.
    dtype: of weights and activations; `auto` is bfloat16 on GPU and TPU, float32 on CPU.
    """

    model: str = setting()
    adapters: tuple[str, ...] = ()
    system: str = ""
    tools: tuple[str, ...] = ()
    tool_rounds: int = setting(5, must=at_least(1))
    thinking: bool = False
    show_speed: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "system", readable(self.system))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReadingConfig, SamplingSettings):
    """Answers to prompts on the command line, or to every record of a file.

    model: a Hugging Face folder, a run whose model/ is meant, or a name on the hub.
    prompt: prompts; each is answered.
    input: files, folders or globs of records with `prompt` or `text` (str) or `conversations` (a list of messages; a
        last assistant message is left out and generated anew), instead of prompts.
    image: pictures that each prompt shows: paths of files; they stand in front of it, or where it says `<image>`.
    output: the JSON lines that are written: each record of the input with `completion` and `finish_reason` added;
        empty prints them.
    as_conversations: write conversations that end with the answer instead, which `minimind sft` can be trained on.
    long_prompts: of a file; one that leaves no room for its answer (max_new_tokens, or any) stops the call before
        anything is generated, is left out (skip), or loses its beginning (cut: the oldest turns, then that of the
        question).
    resume: with `auto` a call that was cut off goes on where it was, with `never` it begins anew.
    raw: continue the text, after the token that begins a document in pretraining, instead of answering it as a user's
        message in the chat template.
    system: a system prompt for prompts that are no conversations; empty for none.
    thinking: let the model think before it answers.
    schema: a file with a JSON schema that every answer is made to fit.
    regex: every answer is made to match it, the whole of it.
    choices: every answer is one of these texts.
    batch_size: prompts answered at the same time.
    dtype: of weights and activations; `auto` is bfloat16 on GPU and TPU, float32 on CPU.
    """

    model: str = setting()
    prompt: tuple[str, ...] = setting((), is_text=True, repeats=True)
    input: tuple[str, ...] = setting((), repeats=True)
    image: tuple[str, ...] = setting((), is_text=True, repeats=True)
    output: str = ""
    as_conversations: bool = False
    long_prompts: Literal["stop", "skip", "cut"] = "stop"
    resume: Literal["auto", "never"] = "auto"
    raw: bool = False
    system: str = ""
    thinking: bool = False
    schema: str = setting("", names="place")
    regex: str = setting("", is_text=True)
    choices: tuple[str, ...] = setting((), is_text=True)
    batch_size: int = setting(16, must=at_least(1))
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "input", (self.input,) if isinstance(self.input, str) else tuple(self.input))
        object.__setattr__(self, "system", readable(self.system))
        for name in ("prompt", "image", "choices"):
            _set_texts(self, name)
        if len(forms := [name for name in ("schema", "regex", "choices") if getattr(self, name)]) > 1:
            raise ValueError(f"{' and '.join(forms)} are all set, and an answer can have one form; keep one of them")
        if bool(self.prompt) == bool(self.input):
            given = "both given" if self.prompt else "both empty"
            raise ValueError(f"prompt and input are {given}; give one of them: --prompt TEXT, or --input FILE.jsonl")
        if self.prompt and (self.output or self.as_conversations):
            given = "output" if self.output else "as_conversations"
            raise ValueError(f"{given} is set without input; answers to prompts are printed")
        if self.image and (self.input or self.raw):
            why = "records of a file name their own" if self.input else "raw continues text alone"
            raise ValueError(f"image is set, and {why}; leave it out, or give --prompt TEXT without raw")
        if self.raw and (self.system or self.thinking or self.as_conversations):
            raise ValueError(
                "raw leaves the chat template out, so system, thinking and as_conversations have no meaning; drop them"
            )


def _unescaped(text: str) -> str:
    """What `text` means where a shell has left the escapes as they were typed; unknown ones stay."""
    meant = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: meant[found[0]], text)


def readable(text: str) -> str:
    """`text` with U+FFFD for every byte that was not UTF-8, which Python keeps as half a surrogate pair."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _set_texts(config, name):
    """A field of texts as a tuple; one text may be given by itself."""
    value = getattr(config, name)
    object.__setattr__(config, name, tuple(map(readable, [value] if isinstance(value, str) else value)))
