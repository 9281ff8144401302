"""Losses of policies as TRL computes them, on drawn log-probabilities: its own method with a small stand-in for `self`.

    python tests/losses/policy_oracle.py        writes tests/fixtures/policy.npz (trl 1.9; 1.16 gives the same)

Nothing here is a formula: test_policy_trl.py compares ours with the file, and with TRL itself where it is installed.
"""

import collections
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).resolve().parent.parent / "fixtures" / "policy.npz"
MAX_NEW_TOKENS, CAP = 16, 2.0

# Name -> what TRL is told, and what ours is. Ours has the reduction apart: see `REDUCTIONS`.
CASES = {
    "grpo": ({}, {}),
    "bnpo": ({}, {}),
    "dr_grpo": ({}, {}),
    "dapo": ({"epsilon_high": 0.28}, {"epsilon_high": 0.28}),
    "cispo": ({"epsilon_high": 5.0}, {"loss": "cispo", "cap": 5.0}),
    "sapo": ({}, {"loss": "sapo"}),
    "dapo capped": ({"delta": 4.0}, {"cap": 4.0}),
    "grpo kl": ({"beta": 0.04}, {"kl_estimator": "k3"}),
    "cispo kl": ({"beta": 0.1, "epsilon_high": 5.0}, {"loss": "cispo", "cap": 5.0, "kl_estimator": "k3"}),
    "grpo sequence": (
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "dapo entropy": ({"entropy_coef": 0.02}, {"entropy": 0.02}),
    "dapo token_truncate": ({}, {"correction": "token", "correction_cap": CAP}),
    "dapo sequence_truncate": ({}, {"correction": "sequence", "correction_cap": CAP}),
    "dapo on policy": ({}, {}),
}
REDUCTIONS = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant"}  # of others: token
GIVEN = ("log_probs", "old", "reference", "sampler", "entropies", "advantages", "mask")


def draw(seed: int = 0, rows: int = 8, columns: int = 12) -> dict[str, np.ndarray]:
    """Completions (rows, columns): ratios near 1 and far outside any clip, advantages of both signs and 0 (a group of
    equal rewards), rows without a token that counts, with one, and with one at the start."""
    rng = np.random.default_rng(seed)
    log_probs = -rng.gamma(2.0, 1.0, (rows, columns))
    apart = rng.choice([0.01, 0.3, 1.0], (3, rows, 1)) * rng.standard_normal((3, rows, columns))
    old, reference, sampler = log_probs + apart
    sampler = old + 0.2 * (sampler - log_probs)
    for row in (0, 5):
        old[row, :3] = log_probs[row, :3] + [6.0, -6.0, 0.0]
    mask = (rng.random((rows, columns)) < 0.7).astype(np.float64)
    mask[[0, 5], :3], mask[1:4] = 1, 0
    mask[2, 5], mask[3, 0] = 1, 1
    advantages = rng.standard_normal(rows) * 2
    advantages[[0, 4, 5]] = -1.7, 0, 1.3
    entropies = rng.random((rows, columns)) * 3
    arrays = (log_probs, old, reference, sampler, entropies, advantages, mask)
    return {name: array.astype(np.float32).astype(np.float64) for name, array in zip(GIVEN, arrays, strict=True)}


def trl_loss(name: str, drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The loss, its gradient by log-probabilities and entropies, and the metrics that TRL keeps."""
    import torch
    from trl import GRPOTrainer

    given = {key: torch.tensor(value) for key, value in drawn.items()}
    log_probs, entropies = given["log_probs"].requires_grad_(), given["entropies"].requires_grad_()
    options, kind = CASES[name][0], name.split()[0]
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1,
        sync_gradients=True, device="cpu",
    )  # fmt: skip
    beta, entropy_coef = options.get("beta", 0.0), options.get("entropy_coef", 0.0)
    truncated = name.endswith("truncate")
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        args=types.SimpleNamespace(
            delta=options.get("delta"), use_bias_correction_kl=False, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05, entropy_target=0.0, steps_per_generation=1,
        ),
        loss_type=kind, beta=beta, epsilon_low=options.get("epsilon_low", 0.2),
        epsilon_high=options.get("epsilon_high", 0.2),
        importance_sampling_level=options.get("importance_sampling_level", "token"),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=truncated,
        vllm_importance_sampling_correction=truncated, aux_loss_enabled=False, router_aux_loss_coef=0.0,
        _entropy_bonus_enabled=entropy_coef > 0, entropy_coef=entropy_coef, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, max_completion_length=MAX_NEW_TOKENS,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
    )  # fmt: skip
    ids = torch.zeros(given["mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": given["mask"], "advantages": given["advantages"],
        "ref_per_token_logps": given["reference"], "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    if name != "dapo on policy":
        inputs["old_per_token_logps"] = given["old"]
    if truncated:  # computed where the rollout is made, which needs the whole trainer
        apart = (given["old"] - given["sampler"]) * given["mask"]
        apart = apart.sum(-1, keepdim=True) if "sequence" in name else apart
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(apart), max=CAP)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    found = {"loss": loss.detach().numpy(), "gradient": log_probs.grad.numpy()}
    if entropies.grad is not None:
        found["entropy_gradient"] = entropies.grad.numpy()
    metrics = {key: np.array(value[0]) for key, value in trainer._metrics["train"].items()}
    return {**found, **{f"metric {key}": value for key, value in metrics.items()}}


def all_losses(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By `CASE: WHAT`."""
    return {f"{name}: {what}": value for name in CASES for what, value in trl_loss(name, drawn).items()}


if __name__ == "__main__":
    given = draw()
    np.savez_compressed(FILE, **given, **all_losses(given))
