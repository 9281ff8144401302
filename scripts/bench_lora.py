"""A training step of adapters against one of all weights, in turn in one process: time, and bytes of optimizer state.

    python scripts/bench_lora.py                                   MiniMind-3's size, rank 16 on all projections
    python scripts/bench_lora.py --hidden_size 512 --rank 8 --targets q_proj o_proj

Prints one JSON line.
"""

import argparse
import statistics
import time

import bench_common as bench
import jax
import numpy as np

from minimind_jax.config.sections import LoRAConfig, TextConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.convert.peft import rank_table
from minimind_jax.huge_pages import use_huge_pages
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import init_adapters, join, make_adapter
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.seeds import named_key
from minimind_jax.sharding import init_params, make_mesh, param_shardings, shard_batch
from minimind_jax.training.defaults import filled
from minimind_jax.training.state import Parameters, create_state
from minimind_jax.training.step import make_program


class Side:
    """A model in training; with `adapters` their rank table."""

    def __init__(self, config: PretrainConfig, shape: ModelConfig, adapters: dict | None):
        self.mesh = make_mesh(config.mesh)
        model = LanguageModel(shape, config.compute, make_adapter(adapters) if adapters else None)
        base = LanguageModel(shape, config.compute)

        def load():
            params = init_params(base, named_key(0, "init"), self.mesh)
            if adapters:
                params = join(params, init_adapters(named_key(0, "lora"), params, adapters, 32.0, False))
            return jax.device_put(params, param_shardings(self.mesh, parameters.axes, parameters.abstract))

        parameters = Parameters.of(model, load)
        self.program = make_program(config, parameters, make_language_model_loss(model), self.mesh, 10**6)
        trained, frozen = parameters.split(parameters.load())
        self.state = create_state(trained, self.program.optimizer, self.program.shardings)
        self.state = self.state._replace(frozen=frozen)

    def seconds(self, batch: dict) -> float:
        started = time.perf_counter()
        self.state, metrics = self.program.step(self.state, shard_batch(batch, self.mesh))
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    @property
    def optimizer_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.opt_state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=list(LoRAConfig().targets))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=340)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    rows = TrainingConfig(batch_tokens=args.rows * args.seq_len)
    config = filled(PretrainConfig(data=TextConfig(seq_len=args.seq_len), training=rows))
    shape = ModelConfig(hidden_size=args.hidden_size, num_hidden_layers=args.layers)
    adapters = rank_table(shape, args.rank, args.targets, {})
    sides = {"all": Side(config, shape, None), "lora": Side(config, shape, adapters)}
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (args.rows, args.seq_len)).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
    batch |= {"positions": np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), tokens.shape)}
    batch |= {"loss_weights": np.ones(tokens.shape, np.float32)}
    for side in sides.values():
        side.seconds(batch)  # compiles
    times = {name: [] for name in sides}
    for _ in range(args.pairs):
        for name, side in sides.items():
            times[name].append(side.seconds(batch))
    ratios = [lora / whole for whole, lora in zip(times["all"], times["lora"], strict=True)]
    sizes = {name: side.optimizer_bytes for name, side in sides.items()}
    bench.print_result(
        "lora",
        {name: getattr(args, name) for name in ("hidden_size", "layers", "rank", "targets", "rows", "seq_len")},
        **{"seconds a step": {name: round(statistics.median(found), 3) for name, found in times.items()}},
        **{"lora / all": [round(ratio, 3) for ratio in ratios], "median": round(statistics.median(ratios), 3)},
        **{"optimizer bytes": sizes, "share": round(sizes["lora"] / sizes["all"], 4)},
    )


if __name__ == "__main__":
    use_huge_pages(keep=True)
    main()
