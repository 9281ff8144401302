"""Episodes: which tokens they hold, who wrote them, and what ends them."""

import dataclasses

import pytest
from players import asks, start_of, tiny

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.inference.request import Request
from minimind_jax.rl.environment import SingleTurn
from minimind_jax.rl.play import play
from minimind_jax.seeds import named_seed

DRAWN = SamplingConfig(max_new_tokens=12, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(["birds sing and cats sit on mats"] * 3, tmp_path_factory.mktemp("tokenizer"), 310)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return tiny(tokenizer)


@pytest.fixture
def played(engine, tokenizer):
    settings = {"sampling": DRAWN, "seq_len": 256}
    return lambda starts, environment, **others: play(engine, starts, environment, tokenizer, **settings | others)


def test_a_single_turn_is_what_the_engine_answers(engine, tokenizer, played):
    starts = [
        start_of(tokenizer, asks(word), group=n // 2, seed=n, thinking=n == 2) for n, word in enumerate(["a", "b"] * 3)
    ]
    done = []
    episodes = played(starts, SingleTurn(), report=done.append)
    assert sum(done) == len(starts)
    for start, episode in zip(starts, episodes, strict=True):
        drawn = dataclasses.replace(DRAWN, seed=named_seed(start.seed, "turn", 0) % 2**62)
        request = Request(tuple(start.prompt), drawn, stop_ids=tokenizer.end_ids)
        [answer] = engine.answers([request])
        assert episode.completion == answer.ids and episode.tokens[: episode.prompt] == start.prompt
        assert episode.logprobs[episode.prompt :] == pytest.approx(
            [token.sampled_logprob for token in answer.tokens], abs=1e-5
        )
        assert episode.sampled == [False] * len(start.prompt) + [True] * len(answer.ids)
        [turn] = episode.turns
        assert (turn.start, turn.end) == (episode.prompt, len(episode.tokens))
        assert episode.finish == turn.finish == answer.finish_reason
        assert (episode.group, episode.task, episode.thinking) == (start.group, start.task, start.thinking)
    assert len({tuple(episode.completion) for episode in episodes}) == len(episodes)
