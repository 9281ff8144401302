"""Settings: what the user gave becomes a dataclass, or a message that says where and what is wrong."""

import dataclasses
import functools
import math
import subprocess
import sys
import typing

import pytest
import yaml

from minimind_jax.cli import COMMANDS
from minimind_jax.config.fields import fields_of, help_text
from minimind_jax.config.generation import ChatConfig, GenerateConfig
from minimind_jax.config.serving import ServeConfig
from minimind_jax.config.settings import (
    Setting,
    find_config,
    load_settings,
    make_settings,
    nearest,
    read_yaml,
)
from minimind_jax.config.stages import PretrainConfig, SFTConfig, TokenizerConfig
from minimind_jax.errors import UserError
from minimind_jax.model.config import RopeScaling
from minimind_jax.rules import Settings, at_least, setting


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        file = tmp_path / "own.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


def message(*argv, cls=PretrainConfig):
    with pytest.raises(UserError) as caught:
        load_settings(cls, argv)
    return str(caught.value)


def test_without_arguments_the_defaults_of_the_dataclass():
    for cls in (PretrainConfig, SFTConfig, TokenizerConfig):
        assert load_settings(cls, []) == cls()


def test_command_line_wins_over_yaml_and_yaml_over_defaults(config_file):
    file = config_file("seed: 7\ntraining: {steps: 5, batch_tokens: 1024}\ndata: {seq_len: 256}\n")
    config = load_settings(PretrainConfig, ["--training.steps", "9", "--config", file])
    assert (config.seed, config.training.steps, config.training.batch_tokens, config.data.seq_len) == (7, 9, 1024, 256)
    assert config.optimizer == PretrainConfig().optimizer


def test_a_length_on_the_command_line_replaces_that_of_the_file(config_file):
    config = load_settings(PretrainConfig, ["--config", config_file("training.epochs: 2"), "--training.steps", "9"])
    assert (config.training.steps, config.training.epochs) == (9, None)


def test_later_files_win_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nrun: a\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = load_settings(PretrainConfig, ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert (config.seed, config.run) == (2, "a")


def test_a_subclass_keeps_its_own_section_defaults():
    config = load_settings(SFTConfig, ["--data.seq_len", "384"])
    assert (config.data.seq_len, config.data.packing, config.figures.batch_tokens) == (384, "best_fit", 12288)


@pytest.mark.parametrize(
    "argv",
    [
        ["--data.train", "a.jsonl", "b.jsonl"],
        ["--data.train", "a.jsonl,b.jsonl"],
        ["--data.train=a.jsonl,b.jsonl"],
        ["--data.train", "[a.jsonl, b.jsonl]"],
    ],
)
def test_forms_of_a_list_on_the_command_line(argv):
    assert load_settings(PretrainConfig, argv).data.train == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize("name", ["May, June.jsonl", "[May].jsonl", "[a, b]"])
def test_a_file_that_is_there_is_one_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("")
    assert load_settings(PretrainConfig, ["--data.train", name, "b.jsonl"]).data.train == (name, "b.jsonl")
    assert load_settings(PretrainConfig, ["--data.train", name]).data.train == (name,)


@pytest.mark.parametrize("text", ["[a.jsonl, b.jsonl]", "\n  - a.jsonl\n  - b.jsonl", "a.jsonl,b.jsonl"])
def test_forms_of_a_list_in_yaml(config_file, text):
    assert load_settings(PretrainConfig, ["--config", config_file(f"data.train: {text}")]).data.train == (
        "a.jsonl",
        "b.jsonl",
    )


def test_a_prompt_with_a_comma_stays_whole():
    assert load_settings(PretrainConfig, ["--samples.prompts", "你好,你是谁?"]).samples.prompts == ("你好,你是谁?",)
    config = load_settings(PretrainConfig, ["--samples.prompts", "Hello, who are you?", "[1, 2]"])
    assert config.samples.prompts == ("Hello, who are you?", "[1, 2]")


def test_a_pipeline_s_file_is_told_from_a_stage_s(config_file):
    with pytest.raises(UserError, match=r":2: not a value: .*`stages:` is for minimind pipeline"):
        load_settings(SFTConfig, ["--config", config_file("stages:\n  - sft: {run: a}\n")])


@pytest.mark.parametrize(
    "text, expected", [("5e-4", 5e-4), ("1e-3", 1e-3), (".5", 0.5), ("3", 3.0), ("'2e-4'", 2e-4), ("1.5E-4", 1.5e-4)]
)
def test_numbers_of_yaml(config_file, text, expected):
    config = load_settings(PretrainConfig, ["--config", config_file(f"optimizer: {{learning_rate: {text}}}")])
    assert config.optimizer.learning_rate == expected


def test_whole_numbers_may_be_written_short():
    assert load_settings(PretrainConfig, ["--training.tokens", "1e9"]).training.tokens == 10**9
    assert load_settings(PretrainConfig, ["--training.tokens", "10_000"]).training.tokens == 10_000


@pytest.mark.parametrize("number", ["1234567890123456789", "1_234_567_890_123_456_789", "9007199254740993"])
def test_every_digit_of_a_whole_number_counts(config_file, number):
    exact = int(number)
    for argv in (["--seed", number], ["--config", config_file(f"seed: {number}")]):
        assert load_settings(PretrainConfig, argv).seed == exact
    assert load_settings(PretrainConfig, ["--config", config_file("seed: 010")]).seed == 10  # not octal


@pytest.mark.parametrize("name", ["007", "1e3", "null", "2024", "2024-01-01", "true", "1_0", "0x10", "{a: 1}", "~"])
def test_a_name_made_of_digits_or_yaml_words_stays_text(config_file, name):
    config = load_settings(PretrainConfig, ["--run", name, "--data.train", name, "b"])
    assert (config.run, config.data.train) == (name, (name, "b"))
    if name not in ("null", "~", "{a: 1}"):
        config = load_settings(PretrainConfig, ["--config", config_file(f"run: {name}\ndata.train: [{name}, b]")])
        assert (config.run, config.data.train) == (name, (name, "b"))


HOSTILE = [
    *(
        "",
        "nan",
        "inf",
        "1e309",
        "-1",
        "0",
        "1e30",
        "9" * 5000,
        "1e999999999",
        "1e-400",
        " 3 ",
        "\u0663",
        "0x10",
        "1:30",
    ),
    *("true", "[", "[a", "[1, [2]]", "{a: 1}", "\0", "\udcff", "&a", "*a", "!!python/object:os.system", "'", "%"),
    *(None, True, 10**30, float("nan"), float("inf"), 1e30, 1.5, [], [None], [[1]], {}, {"a": 1}, b"x"),
]


@pytest.mark.parametrize("cls", [command.settings for command in COMMANDS.values()])
def test_a_hostile_value_is_refused_in_words_or_taken(cls):
    base = {"model": Setting("m", "")} if issubclass(cls, ChatConfig | GenerateConfig) else {}
    base |= {field.key: Setting("1", "") for field in fields_of(cls) if field.is_required}
    common = {field.key for field in fields_of(PretrainConfig)} if cls is not PretrainConfig else ()
    for field in fields_of(cls):
        for value in HOSTILE if field.key not in common else ():
            try:
                config = make_settings(cls, base | {field.key: Setting(value, "command line")})
            except UserError as error:
                assert field.key.split(".")[-1] in str(error) or field.key.rpartition(".")[0] in str(error) or base, (
                    str(error)
                )
                continue
            taken = functools.reduce(lambda owner, name: getattr(owner, name), field.key.split("."), config)
            assert not isinstance(taken, float) or math.isfinite(taken), (field.key, value)
            assert type(taken) is not int or abs(taken) < 2**63, (field.key, value)


def test_negative_numbers_are_values():
    assert load_settings(PretrainConfig, ["--mesh.data", "1", "--mesh.fsdp", "-1"]).mesh.fsdp == -1


def test_null_takes_a_setting_back(config_file):
    file = config_file("training: {steps: 5}\nmodel: {head_dim: 32}\n")
    config = load_settings(PretrainConfig, ["--config", file, "--training.steps", "null", "--training.epochs", "2"])
    assert (config.training.steps, config.training.epochs, config.model.head_dim) == (None, 2.0, 32)
    assert "seed is 'null'; expected whole number" in message("--seed", "null")
    assert "seed is None; expected whole number" in message("--config", config_file("seed: null"))


def test_an_optional_section(config_file):
    yarn = "rope_type: yarn, factor: 4, original_max_position_embeddings: 256"
    file = config_file(f"model: {{rope_scaling: {{{yarn}}}}}")
    config = load_settings(PretrainConfig, ["--config", file, "--model.rope_scaling.factor", "8"])
    assert config.model.rope_scaling == RopeScaling("yarn", 8.0, 256)
    assert load_settings(PretrainConfig, ["--config", file, "--model.rope_scaling", "null"]).model.rope_scaling is None
    none = config_file("model: {rope_scaling: null}")
    again = ["--config", none, "--model.rope_scaling.rope_type", "linear", "--model.rope_scaling.factor", "2"]
    again += ["--model.rope_scaling.original_max_position_embeddings", "64"]
    assert load_settings(PretrainConfig, again).model.rope_scaling == RopeScaling("linear", 2.0, 64)
    assert "model.rope_scaling: missing" in message("--model.rope_scaling.factor", "4")


@pytest.mark.parametrize(
    "key, meant",
    [
        ("batch_tokens", "training.batch_tokens"),
        ("training.bach_tokens", "training.batch_tokens"),
        ("data.seqlen", "data.seq_len"),
        ("data.seq-len", "data.seq_len"),
        ("optimiser.name", "optimizer.name"),
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("model.num_layers", "model.num_hidden_layers"),
        ("epochs", "training.epochs"),
        ("initfrom", "init_from"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_its_place(config_file, key, meant):
    assert message(f"--{key}", "3") == f"command line: unknown setting {key}; did you mean {meant}?"
    file = config_file(f"# comment\nseed: 1\n{key}: 3\n")
    assert message("--config", file) == f"{file}:3: unknown setting {key}; did you mean {meant}?"


def test_an_unknown_key_inside_a_section_has_its_line(config_file):
    file = config_file("data:\n  seq_len: 64\n  pakking: pad\n")
    assert message("--config", file) == f"{file}:3: unknown setting data.pakking; did you mean data.packing?"


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("training.steps", "many", "whole number or null"),
        ("training.steps", "1.5", "whole number or null"),
        ("training.batch_tokens", "true", "whole number or null"),
        ("optimizer.learning_rate", "fast", "number or null"),
        ("data.shuffle", "5", "true|false"),
        ("data.packing", "tight", "concat|best_fit|pad"),
        ("tracking.loggers", "[wandb, paper]", "list of tensorboard|wandb|swanlab|trackio"),
        ("run", "[5]", "text"),
    ],
)
def test_a_wrong_type_names_key_value_and_expectation(config_file, key, value, expected):
    file = config_file(f"\n{key}: {value}\n")
    assert message("--config", file) == f"{file}:2: {key} is {yaml.load(value, yaml.BaseLoader)!r}; expected {expected}"


def test_what_a_dataclass_refuses_has_its_key_and_place(config_file):
    file = config_file("training:\n  log_every: 0\n")
    assert message("--config", file) == f"{file}:2: training.log_every is 0; it must be at least 1"
    assert message("--data.val_fraction", "3") == "command line: data.val_fraction is 3.0; it must be between 0 and 1"
    assert "model.hidden_size 100 does not divide by num_attention_heads 3" in message(
        "--model.hidden_size", "100", "--model.num_attention_heads", "3"
    )
    text = message("--training.batch_tokens", "1000", "--data.seq_len", "512")
    assert "training.batch_tokens 1000 does not divide by data.seq_len x" in text and "try 1024" in text
    assert "set one of steps, epochs, tokens" in message("--training.steps", "3", "--training.epochs", "1")


@pytest.mark.parametrize("key, value", [("max_new_tokens", 0), ("temperature", -1), ("top_p", 0), ("top_p", 1.5)])
def test_samples_that_could_not_be_drawn_are_refused(key, value):
    assert f"samples.{key} is {value}" in message(f"--samples.{key}", str(value)).replace(".0;", ";")


def test_a_seed_has_64_bits():
    assert message("--seed", str(2**63)) == f"command line: seed is {2**63}; it must be between -2**63 and 2**63 - 1"
    assert load_settings(PretrainConfig, ["--seed", str(-(2**63))]).seed == -(2**63)
    assert "seed is" in message("--model", "m", "--seed", str(2**63), cls=ChatConfig)


def test_a_class_without_usable_defaults():
    assert load_settings(ChatConfig, ["--model", "m", "--stop", ","]) == ChatConfig(model="m", stop=(",",))
    assert "--model is missing" in message(cls=ChatConfig) and "--model is missing" in message(cls=ServeConfig)


def test_arguments_that_are_no_settings():
    assert message("--seed") == "--seed needs a value, as in --seed VALUE"
    assert "unexpected argument 'train.jsonl'" in message("train.jsonl")


def test_files_that_are_no_configs(tmp_path, config_file):
    assert "no config file pretrian; did you mean pretrain?" in message("--config", "pretrian")
    assert "no config file" in message("--config", str(tmp_path / "gone.yaml"))
    assert "is not valid YAML" in message("--config", config_file("a: [1,"))
    assert "expected `key: value` lines" in message("--config", config_file("- a\n- b\n"))
    assert "seed is set twice" in message("--config", config_file("seed: 1\nseed: 2\n"))
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    assert "is not UTF-8" in message("--config", str(tmp_path / "latin.yaml"))
    assert load_settings(PretrainConfig, ["--config", config_file("# only a comment\n")]) == PretrainConfig()


def test_configs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = find_config("pretrain")
    assert packaged == find_config("pretrain.yaml") and packaged.is_file()
    (tmp_path / "pretrain.yaml").write_text("seed: 3\n")
    assert find_config("pretrain.yaml").resolve() == tmp_path / "pretrain.yaml"


def test_every_field_is_in_the_help_with_a_meaning():
    for cls in (PretrainConfig, SFTConfig, TokenizerConfig, ChatConfig, GenerateConfig):
        text = help_text(cls, "minimind stage", ())
        for field in fields_of(cls):
            assert f"--{field.key} " in text
            assert field.help, f"{field.key} has no line in the docstring of its dataclass"
    assert "default: 512" in help_text(PretrainConfig, "x", ()) and "default: 768" in help_text(SFTConfig, "x", ())


def test_fields_of_finds_every_leaf():
    def leaves(cls, prefix=""):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from leaves(hints[field.name], f"{prefix}{field.name}.")
            else:
                yield prefix + field.name

    assert set(leaves(SFTConfig)) <= {field.key for field in fields_of(SFTConfig)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolConfig:
    """A tool.

    files: to read.
    output: to write.
    """

    files: tuple[str, ...] = setting(positional="FILE")
    output: str = setting(positional="OUTPUT")
    json: bool = setting(False, alone=True)
    clear: typing.Literal["all", "stale"] | None = setting(None, alone="all")
    names: tuple[str, ...] = setting((), is_text=True)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("a b out", {"files": ("a", "b"), "output": "out"}),
        ("a,b out", {"files": ("a,b",), "output": "out"}),
        ("--json a out", {"files": ("a",), "output": "out", "json": True}),
        ("--json false a out", {"files": ("a",), "output": "out"}),
        ("a --clear out", {"files": ("a",), "output": "out", "clear": "all"}),
        ("a --clear stale out", {"files": ("a",), "output": "out", "clear": "stale"}),
        ("a out --names x,y z", {"files": ("a",), "output": "out", "names": ("x,y", "z")}),
        ("a b --output out", {"files": ("a", "b"), "output": "out"}),
        ("--json -- --odd out", {"files": ("--odd",), "output": "out", "json": True}),
        ("--files a b --output out", {"files": ("a", "b"), "output": "out"}),
    ],
)
def test_positional_settings_and_flags_alone(argv, expected):
    assert load_settings(ToolConfig, argv.split()) == ToolConfig(**expected)


def test_positional_settings_may_stand_in_a_file(config_file):
    file = config_file("files: [a, b]\noutput: out\njson: true\n")
    assert load_settings(ToolConfig, ["--config", file]) == ToolConfig(files=("a", "b"), output="out", json=True)


def test_the_rest_of_the_arguments_is_left_as_it_is():
    @dataclasses.dataclass(frozen=True)
    class Wrapper:
        device: str = ""
        json: bool = setting(False, alone=True)
        arguments: tuple[str, ...] = setting((), rest=True)

    words = ["a", "--x", "1,2", "--device", "d", "--config", "c", "--json", "--y=[1]", "--", "b"]
    rest = ("a", "--x", "1,2", "--config", "c", "--y=[1]", "--", "b")
    assert load_settings(Wrapper, words) == Wrapper("d", True, rest)


def test_a_field_with_another_default_keeps_its_rule():
    @dataclasses.dataclass(frozen=True)
    class Small(ToolRules):
        size: int = 3

    assert (ToolRules().size, Small().size) == (5, 3)
    for cls in (ToolRules, Small):
        assert message("--size", "0", cls=cls) == "command line: size is 0; it must be at least 1"
    with pytest.raises(ValueError, match="kind is 'c'; it must be a or b"):
        Small(kind="c")


@dataclasses.dataclass(frozen=True)
class ToolRules(Settings):
    size: int = setting(5, must=at_least(1))
    kind: typing.Literal["a", "b"] = "a"


def test_nearest_prefers_the_same_last_part():
    assert nearest("steps", ["training.steps", "steep"]) == "training.steps"


def test_a_written_config_reads_back(tmp_path):
    """The config.yaml that a run writes is a file for --config."""
    from minimind_jax.training.run import RunFolder

    argv = ["--data.train", "a.jsonl", "--training.steps", "5", "--optimizer.learning_rate", "3e-5", "--run", "r"]
    config = load_settings(SFTConfig, argv)
    run = RunFolder(tmp_path / "r").create()
    run.write_config(config)
    assert load_settings(SFTConfig, ["--config", str(run.config_file)]) == config
    assert read_yaml(run.config_file)["seed"].where == f"{run.config_file}:4"


def test_config_loads_no_jax():
    code = (
        "import sys; from minimind_jax.config import generation, settings, stages, tools; print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
