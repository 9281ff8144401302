"""Writes and scores a few rows with a model that is meant for a GPU, on whatever there is.

`XLA_FLAGS=--xla_dump_to=FOLDER python fixed_order.py` leaves there what the compiler was told of each program.
"""

import dataclasses
import sys

import jax

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.rl import GRPOConfig, PolicyConfig, PromptsConfig, RolloutConfig
from minimind_jax.config.sections import MeshConfig
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.batches import arrays_of
from minimind_jax.rl.policy import LocalPolicy
from minimind_jax.rl.rollout import Row
from minimind_jax.rl.scoring import Scorer
from minimind_jax.sharding import init_params, make_mesh

SIZES = ModelConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=128,
    max_position_embeddings=64,
)  # fmt: skip


def main() -> None:
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    model = LanguageModel(SIZES, ComputeConfig(dtype="float32", deterministic=True), platform="gpu")
    params = init_params(dataclasses.replace(model, platform="cpu"), jax.random.key(0), mesh)
    engine = LocalPolicy(model, None, mesh, slots=2, context=64).load(params)
    prompt, sampling = (5, 6, 7), SamplingConfig(4, 1.0, top_k=0, top_p=1.0, ignore_eos=True)
    rows = []
    for answer in engine.answers(Request(prompt, dataclasses.replace(sampling, seed=seed)) for seed in range(2)):
        sampled = [False] * len(prompt) + [True] * len(answer.ids)
        told = [0.0] * len(prompt) + [token.sampled_logprob for token in answer.tokens]
        rows.append(Row(0, [*prompt, *answer.ids], len(prompt), sampled, told, "length", 0.0, {}, 1, 0, 0))
    config = GRPOConfig(
        rollout=RolloutConfig(prompts=1, completions=2, max_new_tokens=4), policy=PolicyConfig(updates=2),
        data=PromptsConfig(seq_len=16),
    )  # fmt: skip
    scored = Scorer(config, mesh, model, None, None)(params, arrays_of(rows, 16))
    sys.exit("old_log_probs" not in scored)


if __name__ == "__main__":
    main()
