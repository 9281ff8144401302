"""Tokenizers and a chat template that are not this project's."""

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from minimind_jax.convert.gguf_tokenizer import _LLAMA3, _QWEN2, _QWEN35
from minimind_jax.data.tokenizer import Tokenizer

# A template that is not ours: its turns are found, or it is said that there is none.
INST = (
    "{% if messages[0].role == 'system' %}<<{{ messages[0].content }}>>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[U]{{ m.content }}[/U]{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def with_template(tokenizer, folder, template):
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


def byte_level(words):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


RULES = {
    "gpt-2": ([byte_level(True)], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), byte_level(True)], False),
    "qwen2": ([split(_QWEN2), byte_level(False)], False),
    "qwen35": ([split(_QWEN35), byte_level(False)], False),
    "dbrx": ([split(_LLAMA3), byte_level(False)], False),
    "llama-bpe": ([split(_LLAMA3), byte_level(False)], True),
}
TEXTS = ["The 12 quick foxes' 3456 jumps, isn't it?\n\n  Ja, spät — café! 你好，世界 ١٢ ภาษา"] * 20


def make_tokenizer(folder, steps, ignore_merges=False, normalizer=None):
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    backend.add_tokens(["<think>", "<my tag>"])
    if normalizer:
        backend.normalizer = normalizer
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)
