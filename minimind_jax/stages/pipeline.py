"""`minimind pipeline`: stages in order from one YAML file.

    name: small                     # runs/small/ holds everything the pipeline makes
    shared:                         # settings of every stage that has them
      seed: 1
    stages:
      - tokenizer: {data: [corpus.jsonl]}
      - pretrain:
          data: {train: [corpus.jsonl]}
      - sft:
          data: {train: [dialogues.jsonl]}

A finished stage is skipped and one that was cut off is resumed, so the same command can be repeated until all is done.
Unless set, a stage writes to runs/NAME/STAGE, takes the tokenizer of the tokenizer stage, and `sft` starts from the
training stage before it. `--STAGE.key value`, `--shared.key value` and `--name NAME` override the file.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minimind_jax import settings
from minimind_jax.config import PretrainConfig, SFTConfig, TokenizerConfig
from minimind_jax.errors import UserError
from minimind_jax.settings import Setting

CONFIGS = {"tokenizer": TokenizerConfig, "pretrain": PretrainConfig, "sft": SFTConfig}
EXAMPLE = "name: NAME, then stages: with a list of `- tokenizer:`, `- pretrain:`, `- sft:`"


class Stage(NamedTuple):
    """A stage of a pipeline: its name in `CONFIGS` and its settings."""

    name: str
    config: Any

    @property
    def folder(self) -> Path:
        """What the stage writes: the tokenizer's folder, or the run's."""
        return Path(self.config.output if self.name == "tokenizer" else self.config.run)

    @property
    def is_finished(self) -> bool:
        """Whether the stage's result is there; it is written last, and in one step."""
        result = "tokenizer.json" if self.name == "tokenizer" else "model/config.json"
        return (self.folder / result).is_file()


class Pipeline(NamedTuple):
    """Stages in their order, and the folder that remembers with which settings each was finished."""

    folder: Path
    stages: list[Stage]


# Reading --------------------------------------------------------------------------------------------------------------


def load_pipeline(argv: Sequence[str]) -> Pipeline:
    """The pipeline of `--config FILE` and the overrides after it. Raises UserError."""
    configs, overrides = settings.read_arguments(argv)
    if len(configs) != 1:
        raise UserError("a pipeline is one file: minimind pipeline --config FILE")
    file = settings.find_config(configs[0])
    name, shared, stages = _read_file(file)
    name = str(overrides.pop("name", Setting(name, "")).value)
    for key, setting in overrides.items():
        _apply_override(key, setting, shared, stages)
    _check_shared(shared, [stage for stage, _ in stages])
    return Pipeline(Path("runs") / name, _make_stages(Path("runs") / name, shared, stages))


def _read_file(file: Path) -> tuple[str, dict[str, Setting], list[tuple[str, dict[str, Setting]]]]:
    """Name, shared settings, and each stage with its own settings."""
    node, loader = settings.compose_yaml(file)
    sections = {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    for key in sections.keys() - {"name", "shared", "stages"}:
        line = sections[key].start_mark.line + 1
        raise UserError(f"{file}:{line}: unknown key {key}; a pipeline has name, shared and stages")
    if not isinstance(sections.get("stages"), yaml.SequenceNode):
        raise UserError(f"{file} is not a pipeline; it needs {EXAMPLE}")
    shared = settings.flatten_yaml(sections["shared"], loader, str(file)) if "shared" in sections else {}
    name = sections["name"].value if "name" in sections else file.stem
    return name, shared, [_read_stage(item, loader, file) for item in sections["stages"].value]


def _read_stage(item: yaml.Node, loader: yaml.SafeLoader, file: Path) -> tuple[str, dict[str, Setting]]:
    where = f"{file}:{item.start_mark.line + 1}"
    if isinstance(item, yaml.ScalarNode):
        name, body = item.value, None
    elif isinstance(item, yaml.MappingNode) and len(item.value) == 1:
        name, body = item.value[0][0].value, item.value[0][1]
    else:
        raise UserError(f"{where}: a stage is one key with its settings under it, as in `- pretrain: {{...}}`")
    if name not in CONFIGS:
        raise UserError(f"{where}: unknown stage {name}; did you mean {settings.nearest(name, CONFIGS)}?")
    empty = body is None or (isinstance(body, yaml.ScalarNode) and body.value == "")
    return name, {} if empty else settings.flatten_yaml(body, loader, str(file))


def _apply_override(key: str, setting: Setting, shared: dict, stages: list) -> None:
    section, _, rest = key.partition(".")
    targets = [shared] if section == "shared" else [own for name, own in stages if name == section]
    if not targets or not rest:
        known = ["name", *(f"shared.{f}" for f in _shared_keys([name for name, _ in stages]))]
        known += [f"{name}.{field.key}" for name, _ in stages for field in settings.fields_of(CONFIGS[name])]
        raise UserError(f"command line: unknown setting {key}; did you mean {settings.nearest(key, known)}?")
    for target in targets:
        merged = settings.merge(target, {rest: setting})
        target.clear()
        target.update(merged)


def _shared_keys(names: Sequence[str]) -> set[str]:
    return {field.key for name in names for field in settings.fields_of(CONFIGS[name])}


def _check_shared(shared: Mapping[str, Setting], names: Sequence[str]) -> None:
    known = _shared_keys(names)
    for key, setting in shared.items():
        if key not in known:
            near = settings.nearest(key, known)
            raise UserError(f"{setting.where}: no stage has the shared setting {key}; did you mean {near}?")


def _make_stages(folder: Path, shared: Mapping[str, Setting], own: list[tuple[str, dict[str, Setting]]]) -> list[Stage]:
    """Checked settings of every stage, with the defaults that tie the stages together."""
    made: list[Stage] = []
    for name, given in own:
        keys = _shared_keys([name])
        given = settings.merge({key: value for key, value in shared.items() if key in keys}, given)
        stage = Stage(name, settings.make_settings(CONFIGS[name], given, **_defaults(name, folder, made)))
        if stage.folder in [other.folder for other in made]:
            raise UserError(f"two stages write to {stage.folder}; give one of them another run")
        made.append(stage)
    return made


def _defaults(name: str, folder: Path, before: Sequence[Stage]) -> dict[str, str]:
    """Where a stage writes and what it starts from, when its settings do not say."""
    if name == "tokenizer":
        return {"output": str(folder / name)}
    tokenizers = [str(stage.folder) for stage in before if stage.name == "tokenizer"]
    runs = [str(stage.folder) for stage in before if stage.name != "tokenizer"]
    defaults = {"run": str(folder / name)}
    if name == "sft" and runs:
        defaults["init_from"] = runs[-1]
    elif tokenizers:
        defaults["tokenizer"] = tokenizers[-1]
    return defaults


# Running --------------------------------------------------------------------------------------------------------------


def run_pipeline(pipeline: Pipeline) -> bool:
    """Runs what is not done, in order; True when every stage is finished, False when one was stopped."""
    memory = pipeline.folder / "pipeline.yaml"
    finished = yaml.safe_load(memory.read_text(encoding="utf-8")) if memory.is_file() else {}
    renewed = ""
    for number, stage in enumerate(pipeline.stages, 1):
        title = f"[{number}/{len(pipeline.stages)}] {stage.name}"
        current = _as_plain(stage.config)
        if stage.is_finished:
            print(f"{title}: done, in {stage.folder}")
            _tell_changes(stage, finished.get(str(stage.folder), current), current, renewed)
            continue
        print(f"{title}: {stage.folder}")
        importlib.import_module(f"minimind_jax.stages.{stage.name}").run(stage.config)
        if not stage.is_finished:
            print(f"{title}: stopped before its end; the same command goes on from there")
            return False
        renewed = renewed or stage.name
        finished[str(stage.folder)] = current
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(yaml.safe_dump(finished, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return True


def _tell_changes(stage: Stage, before: dict, now: dict, renewed: str) -> None:
    changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        print(f"  its settings have changed since: {'; '.join(changed)}")
    if renewed:
        print(f"  it was made before this {renewed}")
    if changed or renewed:
        print(f"  it is kept as it is; to make it anew, remove {stage.folder} or set another run")


def _as_plain(config: Any) -> dict[str, Any]:
    """Dotted keys and plain values of a stage's settings, those left out that do not change its result."""
    values = {}
    for field in settings.fields_of(type(config)):
        value = config
        for name in field.key.split("."):
            value = getattr(value, name, None)
        if not dataclasses.is_dataclass(value) and field.key != "resume":
            values[field.key] = list(value) if isinstance(value, tuple) else value
    return values
