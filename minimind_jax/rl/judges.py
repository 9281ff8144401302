"""Rewards that a model or a server gives: functions of all episodes, made once of what stands in their brackets."""

import concurrent.futures
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minimind_jax.errors import UserError
from minimind_jax.paths import as_path
from minimind_jax.rl.episode import Episode, Function, foreign
from minimind_jax.rl.http import Server
from minimind_jax.shell import needing

_TOGETHER = 16  # of a batch, and of a request
_REQUESTS = 8  # at the same time
_PATIENCE = 2.0  # seconds with a server that is busy


def written(episode: Episode, thoughts: bool = True) -> list[dict[str, Any]]:
    """The messages behind the prompt: what the policy wrote, and what it was told of its calls.

    thoughts: with them, and with calls as they were written; else calls are `tool_calls`, without the broken ones.
    """
    messages: list[dict[str, Any]] = []
    for turn in episode.turns:
        calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls if not call.error]
        plain = {"content": turn.answer, **({"tool_calls": calls} if calls else {})}
        messages.append({"role": "assistant", **({"content": turn.text} if thoughts else plain)})
        messages += [{"role": "tool", "content": told.text} for told in turn.observations]
    return messages


def talk(episode: Episode) -> list[dict[str, Any]]:
    """The whole conversation, without thoughts."""
    return [*episode.task.messages, *written(episode, thoughts=False)]


def model(folder: str, label: str = "", *, deterministic: bool = False) -> Function:
    """The score of a reward model of ours for the conversation without thoughts; of a classifier of ours the
    probability of the label for the last answer, 0 for an empty one. On this process's devices. Raises UserError for
    another model, and for a label that it has not."""
    from minimind_jax.inference.score import Scorer

    scorer = Scorer(folder, deterministic=deterministic)
    names = scorer.labels.names
    column = _column(f"model({folder}, {label})", label, names)
    said: list[int] = []

    def score(episodes: Sequence[Episode]) -> list[float]:
        if len(names) == 1:
            found = scorer.conversations([(talk(episode), episode.task.tools) for episode in episodes])[:, 0].tolist()
        else:
            found = _likely(episodes, scorer.texts, scorer.labels.several, column)
        if scorer.cut and not said:
            said.append(scorer.cut)
            print(
                f"rewards.use model({folder}): {scorer.cut:,} of {len(episodes):,} completions were longer than the "
                f"{scorer.max_tokens} tokens it reads, and were cut (said once)",
                file=sys.stderr,
            )
        return found

    return score


def _column(what: str, label: str, names: Sequence[str]) -> int:
    """Of a label among the scores of a model."""
    if len(names) == 1 and not label:
        return 0
    if len(names) == 1 or label not in names:
        raise UserError(
            f"rewards.use {what}: its scores are of {', '.join(names)}; expected one of several, none of one"
        )
    return list(names).index(label)


def _likely(
    episodes: Sequence[Episode], logits: Callable[[list[str]], np.ndarray], several: bool, column: int
) -> list[float]:
    """The probability of a label for each last answer, 0 where that is empty. several: one may have several."""
    from minimind_jax.evaluate.classification import classify_logits

    texts = {n: episode.answer for n, episode in enumerate(episodes) if episode.answer.strip()}
    found = classify_logits(logits(list(texts.values())), several)[1][:, column].tolist() if texts else []
    known = dict(zip(texts, found, strict=True))
    return [known.get(n, 0.0) for n in range(len(episodes))]


# Models of others -----------------------------------------------------------------------------------------------------


def _libraries(what: str, folder: str) -> tuple[Any, Any]:
    """torch and transformers, for a model that is in a folder. Raises UserError where one of them is not there."""
    if not as_path(folder).is_dir():
        raise UserError(f"rewards.use {what}({folder}): there is no such folder; download the model into one first")
    with needing(f"rewards.use {what} needs torch and transformers", "rewards"):
        return importlib.import_module("torch"), importlib.import_module("transformers")


def hf(folder: str, label: str = "", device: str = "cpu") -> Function:
    """A transformers sequence classifier: with one score, that of the conversation without thoughts (in its chat
    template, or as the pair of the last question and answer); else the probability of the label for the last answer, 0
    for an empty one. Raises UserError for a model that is none, and for a label that it has not."""
    torch, transformers = _libraries("hf", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoModelForSequenceClassification
    network, told = kind.from_pretrained(folder, output_loading_info=True)
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise UserError(f"rewards.use hf({folder}): no sequence classifier: its weights lack {missing}")
    settings = network.eval().to(device).config
    names = [settings.id2label[n] for n in range(settings.num_labels)]
    column = _column(f"hf({folder}, {label})", label, names)
    tokenizer.truncation_side = "left" if len(names) == 1 else "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings.pad_token_id = tokenizer.pad_token_id
    longest = min(tokenizer.model_max_length, getattr(settings, "max_position_embeddings", None) or sys.maxsize)
    limits = {"truncation": True, "max_length": longest, "padding": True, "return_tensors": "pt"}

    def logits(*texts: list[str], **more: Any) -> np.ndarray:
        inputs = tokenizer(*texts, **limits, **more).to(device)
        with torch.no_grad():
            return network(**inputs).logits.double().cpu().numpy()

    def scores(episodes: Sequence[Episode]) -> np.ndarray:
        if tokenizer.chat_template:
            talks = [tokenizer.apply_chat_template(talk(episode), tokenize=False) for episode in episodes]
            return logits(talks, add_special_tokens=False)[:, 0]
        asked = [episode.task.messages[-1]["content"] for episode in episodes]
        return logits(asked, [episode.answer for episode in episodes])[:, 0]

    if len(names) > 1:
        several = settings.problem_type == "multi_label_classification"
        of_texts = lambda texts: np.concatenate([logits(part) for part in _parts(texts)])  # noqa: E731
        return lambda episodes: _likely(episodes, of_texts, several, column)
    return lambda episodes: [value for part in _parts(episodes) for value in scores(part).tolist()]


def internlm2(folder: str, device: str = "cpu", clip: float = 3.0) -> Function:
    """A reward model with get_score(tokenizer, messages), as InternLM2's have: its score of the conversation without
    thoughts, cut to -clip .. clip as MiniMind does. The folder's own code is run."""
    torch, transformers = _libraries("internlm2", folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    network = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").to(device).eval()
    if not hasattr(network, "get_score"):
        raise UserError(f"rewards.use internlm2({folder}): the model has no get_score; hf({folder}) takes classifiers")

    def of(talks: list[list[dict[str, Any]]]) -> list[float]:
        if hasattr(network, "get_scores"):
            return [float(score) for score in network.get_scores(tokenizer, talks)]
        return [float(network.get_score(tokenizer, messages)) for messages in talks]

    def score(episodes: Sequence[Episode]) -> list[float]:
        with torch.no_grad():
            found = [value for part in _parts(episodes) for value in of([talk(episode) for episode in part])]
        return [max(min(value, clip), -clip) for value in found]

    return score


def _parts(items: Sequence[Any]) -> list[Any]:
    return [items[n : n + _TOGETHER] for n in range(0, len(items), _TOGETHER)]


# A server -------------------------------------------------------------------------------------------------------------


def judge(url: str, timeout: float = 30.0) -> Function:
    """What a server answers to POST (docs/rl_rewards.md has the JSON), in requests of 16 completions, 8 at a time.

    timeout: see `Server`. JUDGE_API_KEY of the environment is sent as a bearer.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"rewards.use judge({url}): expected http:// or https://")
    server = Server(url, timeout, _PATIENCE, "JUDGE_API_KEY")

    def ask(episodes: Sequence[Episode]) -> list[Any]:
        body = {
            "messages": [talk(episode) for episode in episodes],
            "prompts": [episode.task.messages for episode in episodes],
            "completions": [written(episode) for episode in episodes],
            "fields": [episode.task.fields for episode in episodes],
        }
        try:
            told = server.post("", body)
            found = told["rewards"] if "rewards" in told else [item["score"] for item in told["data"]]
            if not isinstance(found, list) or len(found) != len(episodes):
                raise ValueError(f"it gave no list of {len(episodes)} rewards")
        except UserError as error:
            return [str(error)] * len(episodes)
        except (ValueError, TypeError, KeyError) as error:
            return [f"{url}: {type(error).__name__}: {error}"] * len(episodes)
        return [foreign(value) for value in found]

    def ask_all(episodes: Sequence[Episode]) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as threads:
            return [value for part in threads.map(ask, _parts(episodes)) for value in part]

    return ask_all
