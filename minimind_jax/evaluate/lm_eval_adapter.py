"""Our models in lm_eval, EleutherAI's evaluation harness: `--model minimind_jax`.

    minimind evaluate lm-eval --model minimind_jax --model_args pretrained=runs/sft --tasks arc_easy

takes lm_eval's own arguments; so does `lm_eval` itself from the release on that finds plugins. Requests are encoded as
its `hf` model encodes them, so both agree on every log-likelihood.

model_args: pretrained (a Hugging Face folder or a run), dtype (auto, float32 or bfloat16), max_length, max_gen_toks,
add_bos_token, enable_thinking (of the chat template).
"""

import itertools
import sys
from typing import Any

import lm_eval.models  # noqa: F401  registers lm_eval's own, which it would not do after ours
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.tools import LMEvalConfig
from minimind_jax.data.documents import begun
from minimind_jax.errors import UserError
from minimind_jax.inference.likelihood import LikelihoodScorer, encode_pair
from minimind_jax.inference.load import load_engine
from minimind_jax.inference.request import Request
from minimind_jax.progress import progress, tracked

DEFAULT_BATCH = 16


def run(config: LMEvalConfig) -> None:
    """lm_eval's own command, with our model registered."""
    from lm_eval.__main__ import cli_evaluate  # which imports its models, and so us where it finds plugins

    sys.argv = ["lm_eval", *config.arguments]
    cli_evaluate()


@register_model("minimind_jax")
class MiniMindJax(TemplateLM):
    """A model of ours, or any Qwen3 folder, behind lm_eval's interface."""

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = DEFAULT_BATCH,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        enable_thinking: bool = False,
        **_: Any,
    ):
        super().__init__()
        if not pretrained:
            raise UserError("minimind_jax needs a model: --model_args pretrained=FOLDER")
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else DEFAULT_BATCH  # `auto` is lm_eval's word
        self.engine = load_engine(str(pretrained), dtype, slots=self.batch_size)
        limit = int(max_length) if max_length else None
        self.scorer = LikelihoodScorer(self.engine.model, self.engine.params, self.batch_size, limit)
        self.max_length = self.scorer.context
        self.max_gen_toks, self.add_bos_token = int(max_gen_toks), _is_true(add_bos_token)
        self.enable_thinking, self.name = _is_true(enable_thinking), str(pretrained)

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin token, or the end token where there is none."""
        bos = self.engine.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.engine.tokenizer
        ids = tokenizer.encode(string)
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return begun(tokenizer, ids) if wanted else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        segments = self.engine.tokenizer.prompt_segments(
            chat_history, add_generation_prompt=add_generation_prompt, open_thinking=self.enable_thinking
        )
        text = "".join(segment.text for segment in segments)
        # To be continued: lm_eval adds the beginning of an answer, whose turn must stay open.
        return text if add_generation_prompt else text.rstrip().removesuffix("<|im_end|>")

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations of contexts. Raises UserError, with task and document, for one of which nothing is left."""
        encoded = []
        for number, request in enumerate(requests):
            where = f"{getattr(request, 'task_name', None) or 'request'} {getattr(request, 'doc_id', number)}"
            pair = encode_pair(self.tok_encode, *request.args, self.prefix_token_id, where)
            encoded.append((request.args, *pair))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with progress("scoring", len(pairs), show=not disable_tqdm) as advance:
            found = self.scorer.score(pairs, advance)
        return [(likelihood.log_prob, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as long as the model's context, each token predicted once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = list(map(utils.make_disjoint_window, parts))
            windows += own
            counts.append(len(own))
        with progress("scoring", len(windows), show=not disable_tqdm) as advance:
            log_probs = iter([likelihood.log_prob for likelihood in self.scorer.score(windows, advance)])
        return [sum(itertools.islice(log_probs, count)) for count in counts]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy unless the task says otherwise; a stop string ends an answer and is not part of it."""
        asked = (self._request(*request.args) for request in requests)
        answers = tracked(self.engine.answers(asked), "writing", len(requests), show=not disable_tqdm)
        return [answer.text for answer in answers]

    def _request(self, context: str, options: dict[str, Any]) -> Request:
        sampling = self._sampling(options)
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {sampling.max_new_tokens} leaves no room for a prompt in {self.max_length} tokens"
            )
        return Request(tuple(self.tok_encode(context)[-room:]), sampling)

    def _sampling(self, options: dict[str, Any]) -> SamplingConfig:
        stop = options.get("until") or ()
        greedy = not options.get("do_sample", bool(options.get("temperature")))
        return SamplingConfig(
            max_new_tokens=int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks),
            temperature=0.0 if greedy else float(options.get("temperature") or 1.0),
            top_p=float(options.get("top_p") or 1.0),
            top_k=int(options.get("top_k") or 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )


def _is_true(value: bool | str) -> bool:
    return str(value).lower() in ("true", "1", "yes")
