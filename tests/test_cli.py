"""The `minimind` command: help that answers at once, and mistakes told without a traceback."""

import json
import os
import subprocess
import sys
import time
import types

import pytest

from minimind_jax import __version__, cli
from minimind_jax.cli import COMMANDS, main
from minimind_jax.config.settings import fields_of
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.errors import UserError

RUN = "import sys; from minimind_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def test_overview_fits_a_screen_and_names_every_command(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) / 2 <= 40
    for name, command in COMMANDS.items():
        assert f"  {name} " in text and command.summary in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minimind {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    try:
        status = main([*name.split(), "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    assert len(capsys.readouterr().out) > 100


def test_help_of_a_stage_shows_every_field_without_loading_jax():
    check = "\n".join(
        [
            "import sys",
            "from minimind_jax.cli import main",
            "try: main(['pretrain', '--help'])",
            "except SystemExit: pass",
            "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'tokenizers', 'torch'} & set(sys.modules)",
            "print('heavy:', *heavy)",
        ]
    )
    started = time.perf_counter()
    text = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - started
    assert text.splitlines()[-1] == "heavy:"
    assert all(f"--{field.key} " in text for field in fields_of(PretrainConfig))
    # The aim is below a second on a quiet machine; tests share it.
    assert seconds < 5


@pytest.mark.parametrize(
    "argv, text",
    [
        (["pretrian"], "unknown command pretrian; did you mean pretrain?"),
        (["convert", "from_hf"], "unknown command convert from_hf; did you mean convert from-hf?"),
        (["convert"], "convert is a group of commands: convert from-hf"),
        (["pretrain", "--training.stepz", "3"], "unknown setting training.stepz; did you mean training.steps?"),
        (["pretrain", "--config", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["pipeline"], "minimind pipeline --config FILE"),
        (["report", "nowhere"], "is not a run"),
        (["convert", "to-hf", "nowhere", "out"], "neither a Hugging Face folder nor a run"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(argv, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert text in printed.err and printed.err.startswith("minimind: ") and "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["from-hf", "to-hf", "from-torch"])
@pytest.mark.parametrize("size", ["0", "-5", "5GB", "nan"])
def test_a_size_of_shards_that_is_no_number_is_refused(command, size, capsys):
    with pytest.raises(SystemExit) as end:
        main(["convert", command, "in", "out", f"--max_shard_bytes={size}"])
    assert end.value.code == 2
    assert f"argument --max_shard_bytes: {size} is not a number above 0" in capsys.readouterr().err


def test_a_mistake_in_the_data_ends_a_real_process_without_traceback(tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"txt": "no such field"}) + "\n")
    command = [sys.executable, "-c", RUN, "tokenizer", "--data", "text.jsonl", "--output", "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 2
    assert "text.jsonl:1" in ended.stderr and "text" in ended.stderr and "Traceback" not in ended.stderr


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    def interrupted(prog, argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "report", COMMANDS["report"]._replace(run=interrupted))
    assert main(["report", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_module_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "minimind_jax", "--version"], capture_output=True, text=True)
    assert shown.stdout.startswith("minimind ")


def test_a_terminal_without_chinese_gets_escapes():
    arguments = [sys.executable, "-m", "minimind_jax", "chat", "--model", "你好"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, encoding="ascii")
    assert done.returncode == 2 and "\\u4f60\\u597d" in done.stderr and "Traceback" not in done.stderr


def test_profile_is_short_for_five_steps(monkeypatch):
    trained = []
    stage = types.SimpleNamespace(config=PretrainConfig, load=lambda: trained.append)
    monkeypatch.setitem(cli.STAGES, "pretrain", stage)
    assert cli.main(["pretrain", "--profile", "--training.profile_start", "3"]) == 0
    assert (trained[0].training.profile_steps, trained[0].training.profile_start) == (5, 3)


def test_the_flags_of_several_processes_go_where_jax_is_started_from(monkeypatch):
    for variable in cli.PROCESS_FLAGS.values():
        monkeypatch.setenv(variable, "before")
    words = ["--run", "a", "--coordinator_address", "host:1", "--process_id=0", "--num_processes", "2", "--seed", "3"]
    assert cli._take_process_flags(words) == ["--run", "a", "--seed", "3"]
    assert [os.environ[name] for name in cli.PROCESS_FLAGS.values()] == ["host:1", "2", "0"]
    with pytest.raises(UserError, match="--process_id needs a value"):
        cli._take_process_flags(["--process_id"])
