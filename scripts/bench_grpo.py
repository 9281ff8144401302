"""Speed of a whole GRPO step: the stage of `minimind grpo`, MiniMind's trainer/train_grpo.py and TRL's GRPOTrainer.

    python scripts/bench_grpo.py --minimind CHECKOUT --one_core --folder FOLDER
    python scripts/bench_grpo.py --sides ours --tokenizer FOLDER --folder FOLDER        # without torch

The same random weights and prompts for all, and a reward that costs nothing: each side runs its own trainer, unchanged,
and waits before each step to be asked for it; sides are asked in turn. Each samples at its own trainer's settings: ours
and TRL's at temperature 1 from all words, MiniMind's at 0.8 with top-k 50 and top-p 0.85, which it does not let choose.
A divergence of weight 0.1 from a reference model is part of each. Prints one JSON line a round: seconds of each side's
step, theirs / ours, and the shares of ours by the clock. Needs torch and transformers; `trl` for TRL's side.
"""

import argparse
import json
import os
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import bench_common as bench

LEARNING_RATE, BETA, STEPS = 1e-6, 0.1, 1000  # more steps than are ever asked for
SIDES = ("ours", "minimind", "trl")


class Steps:
    """Between two steps of a trainer: answers for the one that is done, and waits to be asked for the next."""

    def __init__(self):
        self._answers, self._started, self.told = os.dup(1), 0.0, {}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a trainer prints is no answer

    def wait(self) -> None:
        if self._started:
            answer = {"seconds": time.perf_counter() - self._started, **self.told}
            os.write(self._answers, (json.dumps(answer) + "\n").encode())
        if not sys.stdin.readline():
            os._exit(0)  # asked for no more: the trainer's own ending is not needed
        self._started = time.perf_counter()


def make_texts(settings: dict) -> list[str]:
    """A question for each prompt, all of one length."""
    return [f"How many eggs are in {number} boxes of a dozen?" for number in range(10, 10 + settings["prompts"])]


def write_start(settings: dict) -> None:
    """The model that all start from, and our prompts."""
    import jax

    from minimind_jax.config.sections import MeshConfig
    from minimind_jax.convert.hf import save_hf
    from minimind_jax.data.tokenizer import Tokenizer
    from minimind_jax.model.config import ModelConfig
    from minimind_jax.model.transformer import LanguageModel
    from minimind_jax.sharding import init_params, make_mesh

    config, folder = ModelConfig(hidden_size=settings["hidden_size"]), Path(settings["folder"])
    params = init_params(LanguageModel(config), jax.random.key(0), make_mesh(MeshConfig()))
    save_hf(folder / "start", config, params, Tokenizer.load(settings["tokenizer"]), dtype="float32")
    with open(folder / "prompts.jsonl", "w") as file:
        for text in make_texts(settings):
            file.write(json.dumps({"conversations": [{"role": "user", "content": text}]}) + "\n")


def serve_ours(settings: dict) -> None:
    import jax

    from minimind_jax.cli import main as minimind
    from minimind_jax.rl.source import Rollouts

    steps, following, folder = Steps(), Rollouts.next, Path(settings["folder"])

    def wait_and_follow(source: Rollouts, step: int, params: dict):
        jax.block_until_ready(params)
        steps.wait()
        batch, told = following(source, step, params)
        steps.told = {name: told[name] for name in ("time/rollout", "time/rewards", "time/score")}
        return batch, told

    Rollouts.next = wait_and_follow
    arguments = [
        *("--init_from", str(folder / "start"), "--data.train", str(folder / "prompts.jsonl")),
        *("--run", str(folder / "run"), "--data.seq_len", str(settings["seq_len"]), "--data.val_fraction", "0"),
        *("--rollout.prompts", str(settings["prompts"]), "--rollout.completions", str(settings["completions"])),
        *("--rollout.max_new_tokens", str(settings["new_tokens"]), "--rewards.use", "repetition(3)"),
        *("--policy.beta", str(BETA), "--policy.kl_estimator", "k3", "--training.steps", str(STEPS)),
        *("--optimizer.learning_rate", str(LEARNING_RATE), *settings["ours"]),
    ]
    sys.exit(minimind(["grpo", *arguments]))


def load_torch_model(settings: dict, kind: type):
    """A model of MiniMind's own classes with the weights of all."""
    from model.model_minimind import MiniMindConfig
    from safetensors.torch import load_file

    model = kind(MiniMindConfig(hidden_size=settings["hidden_size"], num_hidden_layers=8))
    missing, unknown = model.load_state_dict(load_file(f"{settings['folder']}/start/model.safetensors"), strict=False)
    assert not unknown and missing in ([], ["lm_head.weight"]), (missing, unknown)
    return model


def serve_minimind(settings: dict) -> None:
    """Its epoch, in its checkout, over batches of the prompts."""
    sys.path.insert(0, ".")
    import torch
    from model.model_minimind import MiniMindForCausalLM
    from trainer import train_grpo as trainer
    from trainer.rollout_engine import TorchRolloutEngine
    from transformers import AutoTokenizer

    steps, model = Steps(), load_torch_model(settings, MiniMindForCausalLM)
    trainer.tokenizer = tokenizer = AutoTokenizer.from_pretrained("model")
    asked = [[{"role": "user", "content": text}] for text in make_texts(settings)]
    prompts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
    trainer.args = types.SimpleNamespace(
        device="cpu", max_seq_len=0, max_gen_len=settings["new_tokens"], num_generations=settings["completions"],
        debug_mode=False, loss_type="grpo", epsilon=0.2, epsilon_high=5.0, beta=BETA, accumulation_steps=1, epochs=1,
        log_interval=1, grad_clip=1.0, save_interval=10**9,
    )  # fmt: skip
    trainer.lm_config, trainer.autocast_ctx, trainer.model = types.SimpleNamespace(use_moe=False), nullcontext(), model
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    trainer.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, T_max=STEPS)
    reference = load_torch_model(settings, MiniMindForCausalLM).eval().requires_grad_(False)
    judge = types.SimpleNamespace(get_score=lambda messages, answer: float(len(answer)))

    def batches():
        while True:
            steps.wait()
            yield {"prompt": prompts}

    trainer.grpo_train_epoch(0, batches(), 10**9, TorchRolloutEngine(model, tokenizer, "cpu"), reference, judge)


def serve_trl(settings: dict) -> None:
    """Its GRPOTrainer over transformers, without vLLM."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    steps, count = Steps(), settings["prompts"] * settings["completions"]

    class Asked(TrainerCallback):
        def on_train_begin(self, *given, **more):
            steps.wait()  # a step begins before `on_step_begin`: with its rollout

        def on_step_end(self, *given, **more):
            steps.wait()

    config = GRPOConfig(
        output_dir=f"{settings['folder']}/trl", use_cpu=True, per_device_train_batch_size=count, max_steps=STEPS,
        num_generations=settings["completions"], max_completion_length=settings["new_tokens"], beta=BETA,
        learning_rate=LEARNING_RATE, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in make_texts(settings)]
    start = f"{settings['folder']}/start"
    trainer = GRPOTrainer(
        start, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Asked()],
        processing_class=AutoTokenizer.from_pretrained(start),
        reward_funcs=lambda completions, **_: [float(len(one[0]["content"])) for one in completions],
    )  # fmt: skip
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of jingyaogong/minimind")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json; MiniMind's own by default")
    parser.add_argument("--python", default=sys.executable, help="that has torch, transformers and trl")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--one_core", action="store_true", help="count processor seconds on one core")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--seq_len", type=int, default=128, help="of our rows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="for what the sides write")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="more settings of our run; last")
    args = parser.parse_args()
    if args.one_core:
        bench.use_one_core()
    if not args.minimind and ("minimind" in args.sides or not args.tokenizer):
        parser.error("--minimind is missing; ours and TRL's side can do with --tokenizer")
    tokenizer = args.tokenizer or str(args.minimind / "model")
    settings = {name: getattr(args, name) for name in ("hidden_size", "prompts", "completions", "new_tokens")}
    more = {"seq_len": args.seq_len, "folder": str(args.folder.resolve()), "ours": args.ours}
    settings |= more | {"tokenizer": tokenizer}
    args.folder.mkdir(parents=True)
    write_start(settings)
    told, script = json.dumps(settings), str(Path(__file__).resolve())
    commands = {name: [args.python, script, "--serve", name, told] for name in SIDES}
    commands["ours"] = [sys.executable, "-c", bench.START % False, script, "--serve", "ours", told]
    sides = {name: bench.Side(commands[name], args.minimind if name == "minimind" else None) for name in args.sides}
    for number in range(args.rounds + 1):  # the first, in which ours compiles, is no measure
        answers = {name: side.ask(step=1) for name, side in sides.items()}
        ratios = {
            f"{name} / ours": round(answers[name]["seconds"] / answers["ours"]["seconds"], 2)
            for name in answers
            if name != "ours"
        }
        bench.print_result("grpo", settings, round=number, answers=answers, ratios=ratios)
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        {"ours": serve_ours, "minimind": serve_minimind, "trl": serve_trl}[sys.argv[2]](json.loads(sys.argv[3]))
    else:
        main()
