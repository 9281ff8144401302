"""A pipeline: from its file and the arguments to the checked settings of each stage; see `config.tools` for both."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minimind_jax.config import settings
from minimind_jax.config.fields import Field, fields_of
from minimind_jax.config.settings import Setting
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_run
from minimind_jax.runs.kind import StageKind
from minimind_jax.stages import STAGES

Given = dict[str, Setting]  # by dotted key

TOKENISED = ("text", "conversation")  # records of other stages that a tokenizer can learn from


class Stage(NamedTuple):
    """A stage of a pipeline: its name in `STAGES` and its settings."""

    name: str
    config: Any
    home: Path = Path()  # of the pipeline

    @property
    def kind(self) -> StageKind:
        return STAGES[self.name]

    @property
    def folder(self) -> Path:
        """What the stage writes: the tokenizer's folder, or the run's."""
        return resolve_run(self.config.run) if self.kind.is_run else Path(self.config.output)

    @property
    def record(self) -> Path:
        """Where the settings are kept with which the stage was last run."""
        return self.folder / "config.yaml" if self.kind.is_run else self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def is_finished(self) -> bool:
        """Whether the stage's result is there; it is written last, and in one step."""
        from minimind_jax.training.run import RunFolder
        from minimind_jax.training.tracking import is_exported

        if not self.kind.is_run:
            return (self.folder / "tokenizer.json").is_file()
        return is_exported(RunFolder(self.folder))


# Reading --------------------------------------------------------------------------------------------------------------


def load_pipeline(argv: Sequence[str]) -> list[Stage]:
    """The pipeline of `--config FILE` and the overrides after it. Raises UserError."""
    configs, overrides = settings.read_arguments(argv)
    if len(configs) != 1:
        raise UserError("a pipeline is one file: minimind pipeline --config FILE")
    name, shared, stages = _read_file(settings.find_config(configs[0]))
    name = str(overrides.pop("name", Setting(name, "")).value)
    for key, setting in overrides.items():
        _apply_override(key, setting, shared, stages)
    known = {field.key for field in _fields(stages)}
    for key, setting in shared.items():
        if key not in known:
            near = settings.nearest(key, known)
            raise UserError(f"{setting.where}: no stage has the shared setting {key}; did you mean {near}?")
    return _make_stages(Path("runs") / name, shared, stages)


def _read_file(file: Path) -> tuple[str, Given, list[tuple[str, Given]]]:
    """Name, shared settings, and each stage with its own settings."""
    node = settings.compose_yaml(file)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    sections = {settings.scalar_key(key, str(file)): value for key, value in pairs}
    for key in sections.keys() - {"name", "shared", "stages"}:
        line = sections[key].start_mark.line + 1
        raise UserError(f"{file}:{line}: unknown key {key}; a pipeline has name, shared and stages")
    if not isinstance(sections.get("stages"), yaml.SequenceNode) or not sections["stages"].value:
        example = "name: NAME, then stages: with a list of `- tokenizer:`, `- pretrain:`, `- sft:`"
        raise UserError(f"{file} is not a pipeline; it needs {example}")
    shared = settings.flatten_yaml(sections["shared"], str(file)) if "shared" in sections else {}
    name = settings.scalar_key(sections["name"], str(file)) if "name" in sections else file.stem
    return name, shared, [_read_stage(item, file) for item in sections["stages"].value]


def _read_stage(item: yaml.Node, file: Path) -> tuple[str, Given]:
    where = f"{file}:{item.start_mark.line + 1}"
    if isinstance(item, yaml.ScalarNode):
        name, body = item.value, None
    elif isinstance(item, yaml.MappingNode) and len(item.value) == 1:
        name, body = settings.scalar_key(item.value[0][0], str(file)), item.value[0][1]
    else:
        raise UserError(f"{where}: a stage is one key with its settings under it, as in `- pretrain: {{...}}`")
    if name not in STAGES:
        raise UserError(f"{where}: unknown stage {name}; did you mean {settings.nearest(name, STAGES)}?")
    empty = body is None or body.tag.endswith(":null")
    return name, {} if empty else settings.flatten_yaml(body, str(file))


def _apply_override(key: str, setting: Setting, shared: Given, stages: Sequence[tuple[str, Given]]) -> None:
    section, _, rest = key.partition(".")
    targets = [shared] if section == "shared" else [own for name, own in stages if name == section]
    if not targets or not rest:
        known = ["name", *(f"shared.{field.key}" for field in _fields(stages))]
        known += [f"{stage[0]}.{field.key}" for stage in stages for field in _fields([stage])]
        raise UserError(f"command line: unknown setting {key}; did you mean {settings.nearest(key, known)}?")
    for target in targets:
        merged = settings.merge(target, {rest: setting}, _fields(stages))
        target.clear()
        target.update(merged)


def _fields(stages: Sequence[tuple[str, Given]]) -> list[Field]:
    """Settings that at least one of the stages has."""
    return [field for name, _ in stages for field in fields_of(STAGES[name].config)]


def _make_stages(folder: Path, shared: Given, stages: Sequence[tuple[str, Given]]) -> list[Stage]:
    """Checked settings of every stage, with the defaults that tie the stages together."""
    made: list[Stage] = []
    for name, own in stages:
        fields = fields_of(STAGES[name].config)
        keys = {field.key for field in fields}
        given = settings.merge({key: value for key, value in shared.items() if key in keys}, own, fields)
        defaults = _defaults(name, folder, made)
        if STAGES[name].records == "labelled" and "vision.tower" in given:  # a tower stands in for what reads words
            defaults = {"run": defaults["run"]}
        config = settings.make_settings(STAGES[name].config, given, **defaults)
        stage = Stage(name, config, folder)
        if stage.folder in [other.folder for other in made]:
            raise UserError(f"two stages write to {stage.folder}; give one of them another run")
        made.append(stage)
    return [_with_data(stage, made) for stage in made]


def _with_data(stage: Stage, stages: Sequence[Stage]) -> Stage:
    """A tokenizer stage without files of its own learns from those of the stages that train on text and talk."""
    if stage.kind.is_run or stage.config.data:
        return stage
    others = [other for records in TOKENISED for other in stages if other.kind.records == records]
    files = [file for other in others for file in other.config.data.train]
    return stage._replace(config=dataclasses.replace(stage.config, data=tuple(dict.fromkeys(files))))


def _defaults(name: str, folder: Path, before: Sequence[Stage]) -> dict[str, str]:
    """Where a stage writes and what it starts from, when its settings do not say."""
    kind = STAGES[name]
    if not kind.is_run:
        return {"output": str(folder / name)}
    tokenizers = [str(stage.folder) for stage in before if not stage.kind.is_run]
    runs = [str(stage.folder) for stage in before if stage.kind.is_run and not stage.kind.has_head]
    defaults = {"run": str(folder / name)}
    if kind.config().init_from and runs:
        defaults["init_from"] = runs[-1]
    elif tokenizers:
        defaults["tokenizer"] = tokenizers[-1]
    return defaults
