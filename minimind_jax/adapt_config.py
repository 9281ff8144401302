"""The settings of the stages that adapt a model: preferences, reward models, classifiers, distillation."""

import dataclasses
from typing import Literal

from minimind_jax.config import DataConfig, DType, Figures, OptimizerConfig, PretrainConfig, SFTConfig, at_least

REFERENCE_FREE = ("simpo", "orpo")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How pairs of answers train a model; the formulas are in losses/preference.py.

    loss: `sigmoid` (DPO), `robust`, `hinge`, `ipo`, `sigmoid_norm` (of log-probabilities per token), or without a
        reference model `simpo` and `orpo`.
    beta: how strongly log-probabilities count; for orpo the weight of its odds ratio. TRL's default is 0.1, MiniMind's
        0.15; simpo wants about 2.5.
    label_smoothing: chance that a pair is labelled the wrong way round; of sigmoid, robust, sigmoid_norm and simpo.
    gamma: the margin of simpo, subtracted from the score.
    sft_weight: weight of the chosen answer's own negative log-likelihood per token; null is 1 for orpo, 0 for others.
    precompute_reference: compute the reference's log-probabilities of all pairs once, before the first step, and keep
        them in the run's folder: a third less work in each step, and no second model in memory.
    """

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.4
    sft_weight: float | None = None
    precompute_reference: bool = False

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"preference.beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing is {self.label_smoothing}; it must be at least 0, below 0.5")
        at_least(self, 0, "sft_weight")
        if self.precompute_reference and not self.has_reference:
            raise ValueError(f"preference.precompute_reference is set, and the loss {self.loss} has no reference")

        if self.label_smoothing and self.loss in ("hinge", "ipo", "orpo"):
            raise ValueError(f"preference.label_smoothing is set, and the loss {self.loss} has none")

    @property
    def has_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE


@dataclasses.dataclass(frozen=True)
class DPOConfig(PretrainConfig):
    """Learning from pairs of answers, chosen and rejected (DPO and its relatives). Other fields as in pretraining.

    Both answers of a pair lie in one row of data.seq_len tokens; where they do not fit, the beginning of the prompt is
    cut away on both sides alike. The template's chances are drawn once for a pair.
    """

    FIGURES = Figures(8192, 1, 1e-6, few_rate=2e-5, lora_rate=5e-5, val_fraction=0.05, eval_every=50)

    run: str = "dpo"
    init_from: str = "sft"
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(packing="best_fit", seq_len=2048, system_prompt_probability=0.0)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.preference.precompute_reference and self.data.redraw_each_epoch:
            raise ValueError(
                "preference.precompute_reference computes for one rendering of the pairs, and data.redraw_each_epoch "
                "makes another for every epoch; leave one of them out"
            )


@dataclasses.dataclass(frozen=True)
class RewardConfig(PretrainConfig):
    """A model that scores conversations, trained on pairs of answers (Bradley-Terry). Other fields as in pretraining.

    centring: weight of (score of the chosen + score of the rejected)^2, which keeps scores around 0 (TRL's default is
        0, its paper's 0.01).
    export_dtype: float32, for transformers computes scores in the type that it finds.
    """

    FIGURES = Figures(8192, 1, 2e-5, few_rate=1e-4, lora_rate=5e-4, val_fraction=0.05, eval_every=50)

    run: str = "reward"
    init_from: str = "sft"
    export_dtype: DType = "float32"
    centring: float = 0.01
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(packing="best_fit", seq_len=2048, system_prompt_probability=0.0)
    )

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "centring")


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """What is classified, and how.

    text_field: where a record holds the text, as data.text_field says, too; `text` stands for its other usual names.
    label_field: where it holds its label, or a list of labels (in a text as JSON); `label` stands for labels, category
        and intent, too. What label_text or label_name beside a number says is its name.
    class_weights: `balanced` weighs a class by the inverse of its share of the training data; `none`.
    label_smoothing: share of the target given to all classes alike.
    """

    text_field: str = "text"
    label_field: str = "label"
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"classify.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(PretrainConfig):
    """A classifier of texts, from a model. Other fields as in pretraining; data.seq_len cuts longer texts.

    export_dtype: float32, for transformers computes probabilities in the type that it finds.
    """

    FIGURES = Figures(2048, 10, 3e-4, few_rate=2e-4, lora_rate=1e-3, val_fraction=0.1, eval_every=50)

    run: str = "classifier"
    init_from: str = "pretrain"
    export_dtype: DType = "float32"
    classify: LabelConfig = dataclasses.field(default_factory=LabelConfig)
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(packing="best_fit", seq_len=256))
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(schedule="linear", final_fraction=0.0)
    )

    def __post_init__(self):
        super().__post_init__()
        own, shared = self.classify.text_field, self.data.text_field
        if shared and own not in ("text", shared):
            raise ValueError(f"classify.text_field is {own} and data.text_field {shared}; they mean the same, set one")

    @property
    def text_field(self) -> str:
        """Where a record holds the text."""
        return self.data.text_field or self.classify.text_field


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Whom a model learns from, and how.

    model: the teacher, a Hugging Face folder, a run or a name on the hub, with the student's tokenizer.
    alpha: weight of the cross entropy of the data; the divergence from the teacher has 1 - alpha.
    temperature: both models' logits are divided by it for the divergence, which is then multiplied by its square.
    divergence: `forward` is KL(teacher || student), `reverse` KL(student || teacher), `jsd` their generalised
        Jensen-Shannon divergence (arXiv 2306.13649).
    jsd_beta: weight of the teacher in the mixture of jsd.
    top_k: 0 asks the teacher at every step. Above 0 its so many likeliest words of every token are computed once, kept
        in the run's folder (6 bytes for a word, or 8 above a vocabulary of 65,536) and compared, with all other words
        taken as one; the divergence is that of these k + 1.
    """

    model: str = ""
    top_k: int = 0
    alpha: float = 0.5
    temperature: float = 1.5
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    jsd_beta: float = 0.5

    def __post_init__(self):
        for name in ("alpha", "jsd_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"teacher.{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.top_k < 0:
            raise ValueError(f"teacher.top_k is {self.top_k}; it must be 0 (off) or above")
        if not self.temperature > 0:
            raise ValueError(f"teacher.temperature is {self.temperature}; it must be above 0")
        if self.divergence == "jsd" and not 0 < self.jsd_beta < 1:
            raise ValueError(f"teacher.jsd_beta is {self.jsd_beta}; for jsd it must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class DistillConfig(PretrainConfig):
    """Learning from conversations and from a larger model's probabilities at once. Other fields as in fine-tuning."""

    FIGURES = Figures(12288, 1, 5e-6, few_rate=2e-4, lora_rate=5e-4, val_fraction=0.001)

    run: str = "distill"
    init_from: str = "sft"
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(packing="best_fit", seq_len=768))


CONFIGS = {
    "pretrain": PretrainConfig, "sft": SFTConfig, "dpo": DPOConfig, "distill": DistillConfig, "reward": RewardConfig,
    "classify": ClassifyConfig,
}  # fmt: skip
