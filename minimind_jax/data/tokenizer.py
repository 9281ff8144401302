"""Tokenizers in Hugging Face folders: loading, encoding, streaming decode, and training of a byte-level BPE.

Text that spells a special token, such as "<|im_end|>" in a user's message, is encoded as that token, as MiniMind and
transformers do; whoever serves untrusted text must strip such strings first.
"""

import codecs
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimind_jax.data.messages import CLOSE_THINK, OPEN_THINK, Message
from minimind_jax.data.template import (
    CHAT_TEMPLATE,
    Segment,
    render_jinja,
    render_segments,
    renders_as_ours,
    template_with_images,
    template_without_images,
)
from minimind_jax.data.template_check import FORGOTTEN, check_complete, raise_as_what_it_is
from minimind_jax.data.template_spans import foreign_segments
from minimind_jax.data.token_bytes import bytes_of_tokens
from minimind_jax.data.values import Tell, unheard
from minimind_jax.errors import TemplateFault, UserError
from minimind_jax.folders import tokenizer_folder
from minimind_jax.hub import fetch, is_hub_name
from minimind_jax.paths import as_path, local_folder
from minimind_jax.texts import is_there, read_object, read_text, write_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)

# MiniMind's 36 reserved tokens in the order of their ids; the first 21 are special, the rest survive decoding.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"),
)
RESERVED_TOKENS = (
    *SPECIAL_TOKENS,
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(f"<|buffer{i}|>" for i in range(1, 10)),
)

# Names taken where a folder does not say which token is which, the likeliest first.
_USUAL_NAMES = {
    "bos_token": ("<|im_start|>", "<|begin_of_text|>", "<s>", "<bos>"),
    "eos_token": ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    "pad_token": ("<|endoftext|>", "<pad>"),
}

PROBE_WORD = "zyxprobe"  # what no template writes by itself


class Tokenizer:
    """A Hugging Face tokenizer folder.

    folder: where it was loaded from. vocab_size: the largest id plus one. bos_id: None if it has no such token.
    eos_id, pad_id (the end token where there is no padding token). chat_template: Jinja, ours where the folder has none
    (has_template) or one that renders the same; own_template says so. fingerprint: changes with anything that changes
    token ids.
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], template: str | None):
        self.folder = folder
        self.has_template = template is not None
        template = template and template_without_images(template)
        self.own_template = template is None or renders_as_ours(template)
        self.chat_template = CHAT_TEMPLATE if self.own_template else template
        self._backend = backend
        vocabulary = self.vocabulary()
        self.vocab_size = max(vocabulary.values()) + 1
        special = {name: _special(folder, config, name, vocabulary) for name in _USUAL_NAMES}
        self.bos_id, self.eos_id, self.pad_id = map(vocabulary.get, special.values())
        self.special_tokens = {name: token for name, token in special.items() if token is not None}
        if self.eos_id is None:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: eos_token is missing or not in tokenizer.json; name the token "
                "that ends a text there"
            )
        if self.pad_id is None:
            self.pad_id = self.eos_id
        parts = (backend.to_str(), self.chat_template, str((self.bos_id, self.eos_id, self.pad_id)))
        if not self.own_template:
            parts += ("nothing left out",)  # caches from before that was checked are not taken
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """folder: or a run, whose model/ is meant, or the name of a model on the hub where no folder has that name.
        Raises UserError if the folder has no tokenizer.json, or one of its files cannot be read."""
        if isinstance(folder, str) and is_hub_name(folder) and not is_there(as_path(folder)):
            folder = fetch(folder, "tokenizer", weights=False)
        folder = local_folder(tokenizer_folder(as_path(folder)))
        file = folder / "tokenizer.json"
        if not is_there(file) and is_there(folder / "tokenizer.model"):
            raise UserError(
                f"{folder} has a tokenizer.model alone, which is not read here; make a tokenizer.json of it once, with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        if not is_there(file):
            raise UserError(f"{file}: no such file; expected a tokenizer folder (`minimind tokenizer` makes one)")
        text = read_text(file)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:  # the Rust library raises bare Exception, and panics of no class of Python's
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise UserError(f"{file}: not a tokenizer: {error}; download or train it again") from error
        backend.no_truncation()
        backend.no_padding()
        config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        return cls(folder, backend, config, _read_template(folder, config))

    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def check_same_words(self, own: "Tokenizer", model: str) -> None:
        """Raises UserError where an id is another word than in `own`, the tokenizer that `model` was trained with.

        What one has beyond the other, such as added tokens at the end, is no matter; templates are none either.
        """
        mine = {i: word for word, i in self.vocabulary().items()}
        theirs = {i: word for word, i in own.vocabulary().items()}
        differ = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
        if differ:
            first = differ[0]
            raise UserError(
                f"the tokenizer {self.folder} has other words than {model} was trained with: {len(differ):,} of "
                f"{len(theirs):,} ids differ (id {first} is {mine[first]!r}, in {own.folder} it is {theirs[first]!r}); "
                "take the model's own tokenizer, or train a model from scratch with this one"
            )

    @functools.cached_property
    def turn_end_id(self) -> int | None:
        """The token that the template writes behind an answer; None if it writes none, or text that is no token."""
        after = self._written_after({"role": "assistant", "content": PROBE_WORD})
        return next((i for i in after if i in self._added), None)

    @functools.cached_property
    def turn_end(self) -> str:
        return "" if self.turn_end_id is None else self.decode([self.turn_end_id], skip_special_tokens=False)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: those that the template writes behind one and behind a tool call (only a
        special one: `</tool_call>` is none), and the end-of-text token."""
        call = {"type": "function", "function": {"name": PROBE_WORD, "arguments": {"a": "b"}}}
        after = self._written_after({"role": "assistant", "content": "", "tool_calls": [call]})
        called = [i for i in after if i in self.special_ids][-1:]
        return tuple(dict.fromkeys(i for i in (self.turn_end_id, *called, self.eos_id) if i is not None))

    def _written_after(self, answer: dict[str, Any]) -> list[int]:
        """The tokens that the template writes behind PROBE_WORD in an answer; none if it cannot write it."""
        try:
            segments = self.prompt_segments([{"role": "user", "content": "q"}, answer], add_generation_prompt=False)
        except UserError:
            return []
        _, found, after = "".join(segment.text for segment in segments).rpartition(PROBE_WORD)
        return self.encode(after) if found else []

    @property
    def _added(self) -> dict[int, Any]:
        return self._backend.get_added_tokens_decoder()

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens that it spells are recognised, none are added. Other threads go on meanwhile."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel where TOKENIZERS_PARALLELISM allows it."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD. Tool and think tags are not special and stay."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> np.ndarray:
        """int32 (V,): UTF-8 bytes each id stands for, 0 for special tokens and unused ids."""
        special = self.special_ids
        return np.array([0 if i in special else len(piece) for i, piece in enumerate(self.byte_pieces)], dtype=np.int32)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out when it skips special tokens."""
        return frozenset(i for i, token in self._added.items() if token.special)

    @functools.cached_property
    def mark_ids(self) -> frozenset[int]:
        """Ids of added tokens that are no words: the special ones, and tags such as <think>."""
        tags = {i for i, token in self._added.items() if re.fullmatch(r"<\S+>", token.content)}
        return self.special_ids | tags

    @functools.cached_property
    def byte_pieces(self) -> list[bytes]:
        """The bytes of every id, b"" for unused ids."""
        pieces = [b""] * self.vocab_size
        to_bytes = bytes_of_tokens(self._backend)
        for token, i in self.vocabulary().items():
            pieces[i] = to_bytes(token)
        return pieces

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        keep_empty_think: bool = True,
        variables: Mapping[str, Any] | None = None,
        tell: Tell = unheard,
    ) -> list[Segment]:
        """A whole conversation in pieces with trained flags, by our template or the folder's own.

        keep_empty_think acts on our template only. variables: of the template, that the conversation sets itself.
        tell: hears what the template leaves out on purpose.
        Raises UserError if a message is not written whole, or cannot be written, and for a variable that our template
        does not have; TemplateFault if that is so for every conversation of its kind.
        """
        if not self.own_template:
            render = functools.partial(self._checked_segments, variables=variables or {}, tell=tell)
            try:
                return render(messages, tools)
            except TemplateFault:
                raise
            except UserError as error:
                raise_as_what_it_is(error, messages, tools, render)
        if unknown := [name for name in variables or () if name not in ("enable_thinking", "open_thinking")]:
            raise UserError(
                f"chat_template_kwargs: {unknown[0][:40]!r} is no variable of our chat template, which has "
                "enable_thinking; remove it, or list chat_template_kwargs in data.ignore_fields"
            )
        return render_segments(messages, tools, keep_empty_think=keep_empty_think or bool(variables))

    def _checked_segments(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any], tell: Tell
    ) -> list[Segment]:
        variables = {**variables, **self.special_tokens}
        segments = foreign_segments(self.chat_template, messages, tools, variables)
        render = functools.partial(render_jinja, self.chat_template, tools=tools, **variables)
        if check_complete(messages, tools, segments, render=render):
            tell(FORGOTTEN)
        return segments

    def prompt_opens_thinking(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, open_thinking: bool | None = None
    ) -> bool:
        """Whether the generation prompt behind the messages ends in an open think block."""
        prompt, before = (
            "".join(segment.text for segment in self.prompt_segments(messages, tools, prompts, open_thinking))
            for prompts in (True, False)
        )
        added = prompt.removeprefix(before)
        return added.rfind(OPEN_THINK) > added.rfind(CLOSE_THINK)

    def prompt_segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        open_thinking: bool | None = None,
    ) -> list[Segment]:
        """A prompt in the pieces that training tokenises; one piece under a folder's own template. Raises UserError if
        that leaves out something."""
        if self.own_template:
            return render_segments(messages, tools, add_generation_prompt, open_thinking)
        names = () if open_thinking is None else ("open_thinking", "enable_thinking")
        thinking = dict.fromkeys(names, open_thinking)
        variables = {**self.special_tokens, **thinking, "add_generation_prompt": add_generation_prompt}
        segments = [Segment(render_jinja(self.chat_template, messages, tools, **variables), False, 0)]
        check_complete(messages, tools, segments, with_answers=False)
        return segments

    def save(self, folder: str | Path, image_marker: int | None = None) -> None:
        """Copies the files, tokenizer.json byte for byte, with what other programs need in tokenizer_config.json.

        The chat template goes into tokenizer_config.json and chat_template.jinja alike, since some programs read only
        the one, some only the other; model_input_names keeps transformers 4 from feeding token_type_ids to the model.
        image_marker: the token of images, which the template then writes for them (see `template_with_images`).
        """
        template = self.chat_template
        if image_marker is not None:
            template = template_with_images(template, self.decode([image_marker], skip_special_tokens=False))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        config_file = folder / "tokenizer_config.json"
        found = _read_json(config_file)
        config = found or tokenizer_config(self._backend, self.special_tokens)
        config = {**config, "chat_template": template}
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if config != found:
            write_json(config_file, config)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


class StreamDecoder:
    """Text of a growing sequence of tokens, never half a character. The cost of a token does not grow with the text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._pieces = tokenizer.byte_pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; "" while a character is still open."""
        token_id = int(token_id)
        if token_id in self._skipped or token_id >= len(self._pieces):
            return ""
        return self._decoder.decode(self._pieces[token_id])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


def train_bpe(texts: Iterable[str], folder: str | Path, vocab_size: int = 6400) -> Tokenizer:
    """Trains a byte-level BPE with MiniMind's 36 reserved tokens and writes it to `folder`.

    GPT-2's splitting pattern, no normaliser, no added prefix space, all 256 bytes in the alphabet: every text survives
    encoding and decoding. A corpus with too few distinct pairs gives fewer than vocab_size tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(RESERVED_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:  # the trainer marks every reserved token as special
        token["special"] = token["content"] in SPECIAL_TOKENS
    write_json(folder / "tokenizer.json", content)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", tokenizer_config(backend, names))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="")
    return Tokenizer.load(folder)


def tokenizer_config(backend: tokenizers.Tokenizer, special_tokens: dict[str, str]) -> dict[str, Any]:
    """tokenizer_config.json that transformers 4.57 and 5 load alike, with our template."""
    added = sorted(backend.get_added_tokens_decoder().items())
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    padding = special_tokens.get("pad_token")
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added},
        "additional_special_tokens": [t.content for _, t in added if t.special and t.content != padding],
        **special_tokens,
        "unk_token": padding,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "padding_side": "right",
        "truncation_side": "right",
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _special(folder: Path, config: dict[str, Any], name: str, vocabulary: dict[str, int]) -> str | None:
    """The token the folder names (as a string or {"content": ...}); null means none; unsaid takes a usual name."""
    if name in config:
        token = config[name]
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is no string; expected the token's text")
        return token
    return next((token for token in _USUAL_NAMES[name] if token in vocabulary), None)


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja before the field of tokenizer_config.json, as transformers prefers it."""
    file = folder / "chat_template.jinja"
    if is_there(file):
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is no string; expected a Jinja template")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if is_there(file) else {}
