"""The environment of docs/rl_agents.md works as written."""

import re

from players import Told, asks, start_of, tiny

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.rl import AgentSettings
from minimind_jax.data.tokenizer import train_bpe
from minimind_jax.rl.environment import load_environment
from minimind_jax.rl.play import play
from tests.conftest import ROOT


def test_the_environment_of_the_documentation_is_played(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rl_agents.md").read_text("utf-8"), re.S)
    (tmp_path / "game.py").write_text(code, "utf-8")
    tokenizer = train_bpe(["Guess a number."] * 3, tmp_path / "tokenizer", 300)
    game = load_environment(AgentSettings(environment=f"{tmp_path / 'game.py'}:Guess"), tokenizer)
    drawn = game.start(start_of(tokenizer, asks("q")).task, 5)
    assert drawn == game.start(start_of(tokenizer, asks("q")).task, 5) and 1 <= drawn["number"] <= 9

    said = iter([tokenizer.encode(f"{word}<|im_end|>") for word in ("9", "1", "what", "4")])
    writer = Told(tiny(tokenizer), lambda prompt: next(said))
    start = start_of(tokenizer, asks("Guess a number."), answer=4)
    [episode] = play(writer, [start], game, tokenizer, sampling=SamplingConfig(max_new_tokens=20), turns=5, seq_len=512)
    assert episode.finish == "stop" and episode.state == {"number": 4, "won": 1.0}
    told = [tokenizer.decode(episode.tokens[turn.end :]) for turn in episode.turns[:-1]]
    assert [text.split()[1] for text in told] == ["Lower.", "Higher.", "Lower."]
