"""Losses of pairs as TRL computes them, on drawn log-probabilities; its own methods with a small stand-in for `self`.

    python tests/losses/trl_oracle.py        writes tests/fixtures/preference.npz (trl 1.16)

Nothing here is a formula: test_trl.py compares ours with the file, and with TRL itself where it is installed.
"""

import collections
import types
from pathlib import Path

import numpy as np

LOSSES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo")
BETA, SMOOTHING, GAMMA, CENTRING = 0.3, 0.1, 0.7, 0.01
FILE = Path(__file__).resolve().parent.parent / "fixtures" / "preference.npz"


def draw(seed: int = 0, pairs: int = 24) -> dict[str, np.ndarray]:
    """Log-probabilities of answers (pairs,), summed, of policy and reference; near and far apart, a tie among them."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 40, (2, pairs)).astype(np.float32)
    policy, reference = (-(rng.gamma(2.0, 1.0, (2, pairs)) * counts).astype(np.float32) for _ in range(2))
    policy[:, 0], reference[:, 0] = -7, -7
    policy[:, 1], reference[:, 1] = [-400, -1], [-1, -400]
    policy[:, 2], reference[:, 2] = [-1, -400], [-400, -1]
    scores, margins = rng.standard_normal((2, pairs)).astype(np.float32) * 4, rng.random(pairs).astype(np.float32)
    return {"counts": counts, "policy": policy, "reference": reference, "scores": scores, "margins": margins}


def _stand_in(**fields):
    same = types.SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu", num_processes=1, unwrap_model=lambda x: x
    )
    common = {
        "model": types.SimpleNamespace(training=True),
        "accelerator": same,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return types.SimpleNamespace(**{**common, **fields})


def dpo_loss(name: str, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """One pair at a time, so that the mean over the batch is its loss."""
    import torch
    from trl import DPOTrainer

    found = []
    for pair in range(drawn["counts"].shape[1]):
        counts = drawn["counts"][:, pair].astype(int)
        length = counts.max() + 1
        mask, log_probs = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length - 1)
        for side, count in enumerate(counts):
            mask[side, 1 : count + 1] = 1
            log_probs[side, 0] = float(drawn["policy"][side, pair])  # the sum is all that counts
        outputs = types.SimpleNamespace(
            log_probs=log_probs, entropy=log_probs * 0, mean_logits=log_probs * 0, is_top1=log_probs > 1
        )
        trainer = _stand_in(
            aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
            f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=BETA, label_smoothing=SMOOTHING,
        )  # fmt: skip
        reference = torch.tensor(drawn["reference"][:, pair])
        inputs = {
            "input_ids": mask * 0, "attention_mask": mask * 0 + 1, "completion_mask": mask,
            "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:],
        }  # fmt: skip
        found.append(DPOTrainer._compute_loss(trainer, lambda outputs=outputs, **_: outputs, inputs, False).item())
    return np.array(found, np.float32)


def reference_free_loss(name: str, drawn: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    means = [torch.tensor(side) for side in drawn["policy"] / drawn["counts"]]
    if name == "simpo":
        from trl.experimental.cpo import CPOTrainer

        fields = {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": GAMMA, "label_smoothing": SMOOTHING}
        return CPOTrainer.cpo_loss(_stand_in(beta=BETA, **fields), *means)[0].numpy()
    from trl.experimental.orpo import ORPOTrainer

    return -ORPOTrainer.odds_ratio_loss(_stand_in(beta=BETA), *means)[0].numpy()


def reward_loss(drawn: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from trl import RewardTrainer

    found = []
    for pair in range(drawn["counts"].shape[1]):
        outputs = types.SimpleNamespace(logits=torch.tensor(drawn["scores"][:, pair])[:, None])
        inputs = {"attention_mask": torch.ones(2, 3), "margin": torch.tensor(drawn["margins"][pair : pair + 1])}
        trainer = _stand_in(args=types.SimpleNamespace(center_rewards_coefficient=CENTRING))
        found.append(RewardTrainer.compute_loss(trainer, lambda outputs=outputs, **_: outputs, inputs).item())
    return np.array(found, np.float32)


def all_losses(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The losses of every pair, by name."""
    found = {name: dpo_loss(name, drawn) for name in LOSSES[:5]}
    found |= {name: reference_free_loss(name, drawn) for name in LOSSES[5:]}
    return {**found, "reward": reward_loss(drawn)}


def jsd(student: np.ndarray, teacher: np.ndarray, beta: float, temperature: float) -> float:
    """Mean over tokens of the generalised divergence; beta 0 is KL(teacher || student)."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    logits = (torch.tensor(array)[None] for array in (student, teacher))
    labels = torch.zeros(1, len(student), dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=beta, temperature=temperature).item()


if __name__ == "__main__":
    given = draw()
    np.savez_compressed(FILE, **given, **{f"loss_{name}": value for name, value in all_losses(given).items()})
