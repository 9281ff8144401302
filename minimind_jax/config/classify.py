"""The settings of classifiers, of texts and of pictures."""

# ruff: noqa: RUF009 - sections are frozen, so that one may be the default of all

import dataclasses
from typing import ClassVar, Literal

from minimind_jax.config import sections
from minimind_jax.config.stages import Figures, RunConfig
from minimind_jax.rules import BELOW_1, Settings, setting


@dataclasses.dataclass(frozen=True)
class LabelConfig(Settings):
    """What is classified, and how.

    text_field: where a record holds the text, or the picture, as data.text_field says, too; `text` stands for the usual
        names of both.
    label_field: where it holds its label, or a list of labels (in a text as JSON); `label` stands for labels, category
        and intent, too. What label_text or label_name beside a number says is its name.
    class_weights: `balanced` weighs a class by the inverse of its share of the training data; `none`.
    label_smoothing: share of the target given to all classes alike.
    """

    text_field: str = "text"
    label_field: str = "label"
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = setting(0.0, must=BELOW_1)


@dataclasses.dataclass(frozen=True)
class ClassifyVisionConfig(Settings):
    """How pictures are classified.

    tower: the folder of a SigLIP or SigLIP2 model (or its name on the hub), or of a classifier of pictures, in place of
        init_from: records are then pictures. training.batch_tokens is the number of pictures of a step.
    train: the `head` alone, of which the tower looks at every picture once; or the `tower`, too.
    """

    tower: str = setting("", names="model")
    train: Literal["head", "tower"] = "head"


@dataclasses.dataclass(frozen=True)
class ClassifyConfig(RunConfig):
    """A classifier of texts, from a model, or of pictures, from a tower; data.seq_len cuts longer texts.

    export_dtype: float32, for transformers computes probabilities in the type that it finds.
    """

    FIGURES = Figures(2048, 10, 3e-4, few_rate=2e-4, lora_rate=1e-3, val_fraction=0.1, eval_every=50)
    PICTURE_FIGURES: ClassVar[dict[str, Figures]] = {
        "head": Figures(64, 10, 1e-3, few_rate=1e-3, lora_rate=1e-3, val_fraction=0.1, eval_every=50),
        "tower": Figures(32, 5, 3e-5, few_rate=3e-5, lora_rate=3e-5, val_fraction=0.1, eval_every=50),
    }
    PICTURES_A_ROW: ClassVar[int] = 4

    run: str = "classifier"
    init_from: str = "pretrain"
    export_dtype: sections.DType = "float32"
    classify: LabelConfig = LabelConfig()
    vision: ClassifyVisionConfig = ClassifyVisionConfig()
    data: sections.FilesConfig = sections.FilesConfig(seq_len=256)
    optimizer: sections.OptimizerConfig = sections.OptimizerConfig(schedule="linear", final_fraction=0.0)

    def __post_init__(self):
        if self.of_pictures:
            self._leave_out_words()
        super().__post_init__()
        own, shared = self.classify.text_field, self.data.text_field
        if shared and own not in ("text", shared):
            raise ValueError(f"classify.text_field is {own} and data.text_field {shared}; they mean the same, set one")

    def _leave_out_words(self) -> None:
        """Makes init_from empty and a row one of a few pictures. Raises ValueError for settings of models of texts."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        if self.init_from not in ("", fields["init_from"]):
            raise ValueError(f"init_from {self.init_from} and vision.tower are both set; pictures need the tower alone")
        if self.data.seq_len not in (fields["data"].seq_len, self.PICTURES_A_ROW):
            raise ValueError(f"data.seq_len {self.data.seq_len} is for texts; with vision.tower leave it out")
        for name in ("model", "lora", "tokenizer"):
            if getattr(self, name) != fields[name]:
                raise ValueError(f"{name} is set, and is for texts; with vision.tower leave it out")
        object.__setattr__(self, "init_from", "")
        object.__setattr__(self, "data", dataclasses.replace(self.data, seq_len=self.PICTURES_A_ROW))

    @property
    def of_pictures(self) -> bool:
        return bool(self.vision.tower)

    @property
    def figures(self) -> Figures:
        return self.PICTURE_FIGURES[self.vision.train] if self.of_pictures else super().figures

    @property
    def text_field(self) -> str:
        """Where a record holds the text, or the picture."""
        return self.data.text_field or self.classify.text_field
