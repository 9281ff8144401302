"""Gradients that MiniMind's own train_grpo.py and train_ppo.py make of a given rollout, in float64.

    python tests/losses/minimind_oracle.py MINIMIND        writes tests/fixtures/minimind_rl.npz (MiniMind d65ef2c)

MINIMIND is a checkout of jingyaogong/minimind, whose epochs run unchanged: only the rollout, the tokenizer and the
scores of the reward model are given, and the optimizers note the gradient, which is kept in float32. The policy is
tests/fixtures/dense, and the value model as well, with a head drawn here. MiniMind's value model applies the final norm
twice, which ours does not copy (its author calls it harmless): here it reads the hidden states that its own body
returns.
"""

import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FILE = FIXTURES / "minimind_rl.npz"
PROMPTS, COMPLETIONS, PROMPT_LEN, COMPLETION_LEN, EOS = 3, 4, 6, 8, 2
RATE = 0.01  # of plain gradient descent between the two updates of PPO
KEPT = (  # of the gradients, so that the file stays small: what lies behind everything, and what lies before it
    "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight", "model.norm.weight",
)  # fmt: skip


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    """Prompts padded on the left, and completions: one ends at once, one never does; behind an end there is more of
    it, as MiniMind's generate leaves it."""
    rng = np.random.default_rng(seed)
    rows = PROMPTS * COMPLETIONS
    prompt_lens = np.array([6, 3, 4])
    prompts = rng.integers(3, 160, (PROMPTS, PROMPT_LEN)) * (np.arange(PROMPT_LEN) >= PROMPT_LEN - prompt_lens[:, None])
    completions, ends = rng.integers(3, 160, (rows, COMPLETION_LEN)), rng.integers(1, COMPLETION_LEN, rows)
    ends[:3] = 0, COMPLETION_LEN, 1
    completions[np.arange(COMPLETION_LEN) >= ends[:, None]] = EOS
    apart = rng.standard_normal((rows, COMPLETION_LEN)) * rng.choice([0.05, 0.3, 2.0], (rows, 1))
    return {
        "prompts": prompts, "completions": completions, "scores": rng.normal(size=rows),
        "old_apart": apart, "value_head": rng.normal(size=64) * 0.3,
    }  # fmt: skip


class Tokenizer:
    pad_token_id, eos_token_id = 0, EOS

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, prompts, **_):
        import torch

        ids = torch.tensor(self.ids)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        encoded = types.SimpleNamespace(**inputs)
        encoded.to = lambda device: Encoded(inputs)
        return encoded


class Encoded(dict):
    __getattr__ = dict.__getitem__


def make_model(kind):
    import torch
    from model.model_minimind import MiniMindConfig
    from safetensors.torch import load_file

    model = kind(MiniMindConfig(**json.loads((FIXTURES / "dense.json").read_text())))
    missing, unknown = model.load_state_dict(load_file(FIXTURES / "dense.safetensors"), strict=False)
    assert not unknown, unknown
    assert all("lm_head" in name or "value_head" in name for name in missing), missing
    return model.to(torch.float64)


def log_probs_of(model, output_ids):
    import torch

    with torch.no_grad():
        logits = model(output_ids, attention_mask=(output_ids != 0).long()).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(2, output_ids[:, 1:, None])[..., 0][:, PROMPT_LEN - 1 :]


def make_rollout(drawn, model, prompts):
    """As MiniMind's torch engine returns it, but for log-probabilities that are off."""
    import torch

    completion_ids = torch.tensor(drawn["completions"])
    output_ids = torch.cat([torch.tensor(prompts), completion_ids], dim=1)
    old = log_probs_of(model, output_ids) + torch.tensor(drawn["old_apart"])
    rows = len(output_ids)
    texts = [f"an answer of {row} and {'so ' * (row % 5) + 'on'} </think> and more" for row in range(rows)]
    return types.SimpleNamespace(
        output_ids=output_ids, completion_ids=completion_ids, per_token_logps=old, completions=texts,
        prompt_lens=torch.full((rows,), PROMPT_LEN), completion_mask=torch.ones_like(completion_ids),
    )  # fmt: skip


class Optimizer:
    """Plain gradient descent that notes the gradients it is given."""

    param_groups = ({"lr": RATE},)

    def __init__(self, model):
        self.model, self.noted = model, []

    def step(self):
        import torch

        self.noted.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad

    def zero_grad(self):
        self.model.zero_grad()


def run(drawn, script, loss_type=None):
    """The gradients, logs, rewards and log-probabilities of one epoch of `train_SCRIPT.py` over one batch."""
    import importlib

    import torch
    from model.model_minimind import MiniMindForCausalLM

    trainer, is_ppo = importlib.import_module(f"trainer.train_{script}"), script == "ppo"
    prompts = drawn["prompts"].repeat(COMPLETIONS, 0)
    model, reference = make_model(MiniMindForCausalLM), make_model(MiniMindForCausalLM)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1 + 0.1 * torch.tensor(rng.normal(size=parameter.shape))
    rollout, scores, logged, rewards = make_rollout(drawn, model, prompts), iter(drawn["scores"]), {}, []
    original = trainer.calculate_rewards
    trainer.calculate_rewards = lambda *given: rewards.append(original(*given)) or rewards[-1]
    trainer.args = types.SimpleNamespace(
        device="cpu", max_seq_len=0, max_gen_len=COMPLETION_LEN, num_generations=COMPLETIONS, debug_mode=False,
        loss_type=loss_type, epsilon=0.2, epsilon_high=5.0, beta=0.1, accumulation_steps=1, log_interval=1, epochs=1,
        grad_clip=1e9 if is_ppo else 0, save_interval=10**9, gamma=1.0, lam=0.95, mini_batch_size=len(prompts),
        ppo_update_iters=2, clip_epsilon=0.2, cliprange_value=0.2, vf_coef=0.5, kl_coef=0.02, early_stop_kl=1e9,
        debug_log_ratio=False,
    )  # fmt: skip
    trainer.lm_config, trainer.autocast_ctx = types.SimpleNamespace(use_moe=False), nullcontext()
    engine = types.SimpleNamespace(rollout=lambda **_: rollout, update_policy=lambda _: None)
    judge = types.SimpleNamespace(get_score=lambda messages, answer: next(scores))
    recorder, scheduler = types.SimpleNamespace(log=logged.update), types.SimpleNamespace(step=lambda: None)
    optimizer = Optimizer(model)
    optimizers = {"policy": optimizer}
    if is_ppo:
        trainer.tokenizer = Tokenizer(prompts)
        trainer.actor_model, trainer.actor_optimizer = model, optimizer

        class Critic(trainer.CriticModel):
            def forward(self, input_ids=None, attention_mask=None, **more):
                return self.value_head(self.model(input_ids=input_ids, attention_mask=attention_mask, **more)[0])[
                    ..., 0
                ]

        critic = make_model(Critic)
        with torch.no_grad():
            critic.value_head.weight[:] = torch.tensor(drawn["value_head"])[None]
            critic.value_head.bias.zero_().requires_grad_(False)
        trainer.critic_model, trainer.critic_optimizer = critic, Optimizer(critic)
        optimizers["critic"] = trainer.critic_optimizer
        batch, schedulers = [{"prompt": [""] * len(prompts)}], (scheduler, scheduler)
        trainer.ppo_train_epoch(0, batch, 99, engine, reference, *schedulers, judge, wandb=recorder)
    else:
        trainer.tokenizer = Tokenizer(drawn["prompts"])
        trainer.model, trainer.optimizer, trainer.scheduler = model, optimizer, scheduler
        batch = [{"prompt": [""] * PROMPTS}]
        trainer.grpo_train_epoch(0, batch, 99, engine, reference, judge, wandb=recorder)
    trainer.calculate_rewards = original
    found = {
        "rewards": rewards[0],
        "old": rollout.per_token_logps,
        "reference": log_probs_of(reference, rollout.output_ids),
    }
    found |= {f"logged {name}": np.float64(value) for name, value in logged.items()}
    for who, optimizer in optimizers.items():
        for update, gradients in enumerate(optimizer.noted):
            kept = {name: gradients[name] for name in (*KEPT, "value_head.weight") if name in gradients}
            found |= {f"{who} {update} {name}": gradient.to(torch.float32) for name, gradient in kept.items()}
    return {name: np.asarray(value) for name, value in found.items()}


def main(checkout: str) -> None:
    import torch

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # which norms, softmax, angles and masks are cast to
    sys.path.insert(0, checkout)
    drawn = draw()
    runs = {"grpo": run(drawn, "grpo", "grpo"), "cispo": run(drawn, "grpo", "cispo"), "ppo": run(drawn, "ppo")}
    found = {f"{name}: {what}": value for name, one in runs.items() for what, value in one.items()}
    np.savez_compressed(FILE, **drawn, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
