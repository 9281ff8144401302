"""What the documents, the configs' comments and the scripts tell people to type exists."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from minimind_jax.cli import COMMANDS, main
from minimind_jax.config.fields import fields_of
from minimind_jax.config.settings import config_names, find_config
from minimind_jax.demo.story import report_text
from minimind_jax.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent

FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml"), *ROOT.glob("scripts/*.sh")]
FILES.remove(ROOT / "docs" / "extend.md")  # it adds commands, and has a test of its own
SETTINGS = {name: command.settings for name, command in COMMANDS.items()}


def commands(text: str) -> list[list[str]]:
    """The words of every `minimind ...` line and code span, continued lines joined, comments cut off."""
    text = re.sub(r"\\\n(#?\s*)", " ", text)
    lines = re.findall(r"^[#\s]*(?:\S*/)?minimind (.+)$", text, re.M) + re.findall(r"`minimind ([^`]+)`", text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def known_keys(name: str, capsys) -> set[str]:
    """Everything that may follow `--` in a command."""
    if name in ("pipeline", "demo"):
        stages = {f"{stage}.{field.key}" for stage, kind in STAGES.items() for field in fields_of(kind.config)}
        return {"config", "name", *stages}
    if name == "evaluate lm-eval":
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        return set(re.findall(r"--(\w+)", capsys.readouterr().out))
    fields = fields_of(SETTINGS[name])
    flags = {"config", *(word for field in fields for word in (field.key, field.declared.get("flag")) if word)}
    return flags | known_keys("pretrain", capsys) if name == "plan" else flags


def check(words: list[str], capsys) -> None:
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        groups = {command.split()[0] for command in COMMANDS}
        assert words[0] in {"STAGE", "COMMAND", "--help", "--version"} | groups, f"no command {' '.join(words)}"
        return
    keys = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - {"help", "key", "STAGE.key"}
    assert keys <= known_keys(name, capsys), f"{keys - known_keys(name, capsys)} of: minimind {' '.join(words)}"
    for config in (after for word, after in itertools.pairwise(words) if word == "--config"):
        assert config in ("FILE", "configs/STAGE.yaml") or find_config(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_and_their_keys_exist(file, capsys):
    for words in commands(file.read_text(encoding="utf-8")):
        check(words, capsys)


def test_what_the_demo_says_to_type_next_exists(capsys):
    found = commands(report_text(["fact"], [("question", "before", "after")], 60.0))
    assert [words[0] for words in found] == ["chat", "serve", "pipeline"]
    for words in found:
        check(words, capsys)


@pytest.mark.parametrize("file", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda f: f.name)
def test_settings_named_in_the_documents_exist(file):
    """`section.key` spans and --section.key words outside of commands."""
    keys = {field.key for cls in SETTINGS.values() for field in fields_of(cls)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for section, rest in re.findall(r"[`-](\w+)\.(\w+)[`\s:]", file.read_text(encoding="utf-8")):
        if section in sections and rest not in ("md", "py", "yaml"):
            assert f"{section}.{rest}" in keys, f"{file.name} names a setting {section}.{rest} that is not there"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda f: f.name)
def test_links_and_files_exist(file):
    text = file.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        linked = file.parent / target if target else file
        assert linked.exists(), f"{file.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{file.name} links to {target}#{anchor}"
    for path in re.findall(r"`((?:docs|configs|scripts|tests|minimind_jax)/[\w/.-]+)`", text):
        assert (ROOT / path).exists() or path == "minimind_jax/configs/", f"{file.name} names {path}"


def test_readme_begins_with_the_two_commands_and_the_makefile_has_them():
    lines = [line.split("#")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert [line for line in lines if line][:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make ([\w-]+)", "\n".join(p.read_text() for p in ROOT.glob("*.md")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no {target}"


def test_both_readmes_show_the_same_commands_and_links():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert commands(english) == commands(chinese)
    links = [re.findall(r"\]\(((?!README)[^)]+)\)", text) for text in (english, chinese)]
    assert links[0] == links[1]


def test_every_stage_has_a_script_and_a_config():
    for stage in STAGES:
        name = stage.replace("-", "_")
        assert f'program("{stage}")' in (ROOT / "scripts" / f"train_{name}.py").read_text()
        assert name in config_names()


def test_commands_finds_what_it_should():
    text = "    minimind pretrain --a 1 \\\n      --b 2  # note\n`minimind chat --model X`\n#   minimind sft --c 3\n"
    assert commands(text) == [
        ["pretrain", "--a", "1", "--b", "2"],
        ["sft", "--c", "3"],
        ["chat", "--model", "X"],
    ]
    assert Path(FILES[0]).is_file()
