"""`minimind generate` with a schema, a regular expression or choices."""

import dataclasses
import json
import re

import jsonschema
import pytest

from minimind_jax.cli import main
from minimind_jax.config.generation import GenerateConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.generate_command import run

TICKET = {
    "type": "object",
    "properties": {"label": {"enum": ["billing", "bug"]}, "why": {"type": "string", "maxLength": 20}},
    "required": ["label", "why"],
    "additionalProperties": False,
}


@pytest.fixture
def config(model_folder, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"ticket {n}"}) + "\n" for n in range(4)))
    (tmp_path / "ticket.json").write_text(json.dumps(TICKET))
    return GenerateConfig(
        model=str(model_folder),
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        max_new_tokens=60,
        temperature=1.3,
    )


def completions(config):
    run(config)
    return [json.loads(line)["completion"] for line in open(config.output, encoding="utf-8")]


def test_every_record_gets_an_answer_of_the_form(config, tmp_path):
    for text in completions(dataclasses.replace(config, schema=str(tmp_path / "ticket.json"))):
        jsonschema.validate(json.loads(text), TICKET)
    again = dataclasses.replace(config, resume="never")
    assert {*completions(dataclasses.replace(again, choices=("bug", "billing, late")))} <= {"bug", "billing, late"}
    thinking = completions(dataclasses.replace(again, regex=r"\d{2}[a-c]+", thinking=True))
    for text in thinking:
        assert re.fullmatch(r"\d{2}[a-c]+", text.rpartition("</think>")[2].strip("\n"))
    assert any("</think>" in text for text in thinking)


def test_a_single_prompt_on_the_command_line(config, capsys):
    arguments = ["generate", "--model", config.model, "--prompt", "is it a bug?", "--choices", "yes, it is", "no"]
    assert main(arguments) in (0, None)
    assert capsys.readouterr().out.strip() in ("yes, it is", "no")


def test_forms_that_cannot_be_followed(config, tmp_path):
    with pytest.raises(ValueError, match="regex and choices are all set"):
        dataclasses.replace(config, regex="a", choices=("b",))
    with pytest.raises(UserError, match=r"^regex: .*invalid regex"):
        run(dataclasses.replace(config, regex="(a"))
    (tmp_path / "ticket.json").write_text('{"type": "strng"}')
    with pytest.raises(UserError, match=r"ticket\.json: Invalid type"):
        run(dataclasses.replace(config, schema=str(tmp_path / "ticket.json")))


def test_a_schema_that_has_changed_is_another_form(config, tmp_path):
    bound = dataclasses.replace(config, schema=str(tmp_path / "ticket.json"))
    with open(config.input[0], "a", encoding="utf-8") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"in.jsonl:5"):
        run(bound)
    (tmp_path / "ticket.json").write_text(json.dumps({**TICKET, "required": ["label"]}))
    with pytest.raises(UserError, match="was made with schema"):
        run(bound)
