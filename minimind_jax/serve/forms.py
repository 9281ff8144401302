"""The form that an answer must have: what a request says of it under OpenAI's and vLLM's names, and calls of tools."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from minimind_jax.data.values import loads
from minimind_jax.inference import grammar
from minimind_jax.inference.constrain import Grammars
from minimind_jax.inference.grammar import Form
from minimind_jax.inference.request import Constraint
from minimind_jax.serve import log
from minimind_jax.serve.errors import refused
from minimind_jax.serve.protocol import Drawing, Json, NamedTool, ToolChoice


class Asked(NamedTuple):
    """A form, and the field that asks for it."""

    form: Form
    where: str

    def binder(
        self, grammars: Grammars, limit: int, thinking: Literal["no", "open", "may"] = "no"
    ) -> Callable[[], Constraint]:
        """Makes what binds one answer of at most so many tokens; raises UserError for a form that is wrong."""

        def bind() -> Constraint:
            constraint = grammars.constraint(self.form, limit, thinking, self.where)
            for note in constraint.notes:
                log.once(f"{self.where}: not followed, and left to the tool: {note[:200]}")
            return constraint

        return bind


def form_of(body: Drawing) -> Asked | None:
    """The form of the answer's words. Raises ApiError or UserError for a wrong one, or several."""
    asked = {f"guided_{name}": getattr(body, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    if body.structured_outputs:
        given = body.structured_outputs.model_dump(by_alias=True)
        asked |= {f"structured_outputs.{name}": value for name, value in given.items()}
    if (form := body.response_format) and form.type != "text":
        asked[f"response_format.{form.type}"] = True if form.schema is None else form.schema
    asked = {name: value for name, value in asked.items() if value not in (None, False)}
    kinds = {name.removeprefix("guided_").removeprefix("structured_outputs.") for name in asked}
    if len(asked) > 1 and (len(kinds) > 1 or len(set(map(repr, asked.values()))) > 1):  # guidance says it twice
        raise refused(f"{' and '.join(asked)} both say the answer's form; keep one", next(iter(asked)))
    return next((Asked(_made(name, value), name) for name, value in asked.items()), None)


def _made(name: str, value: Any) -> Form:
    if value is True:
        return grammar.json_object()
    if name.endswith(("json", "json_schema", "json_object")):
        schema = loads(value, name) if isinstance(value, str) else value
        if not isinstance(schema, dict):
            raise refused(f"{name} is not a JSON schema, an object", name)
        return grammar.json_schema(schema)
    makers = {"regex": grammar.regex, "choice": grammar.choice, "grammar": grammar.lark}
    return makers[name.rpartition(".")[2].removeprefix("guided_")](value)


def with_calls(
    words: Asked | None, tools: list[Json] | None, choice: ToolChoice, parallel: bool, grammars: Grammars
) -> Asked | None:
    """The form of an answer that may, or must, call tools; words: of one that calls none."""
    if not tools:
        return words
    name = choice.called if isinstance(choice, NamedTool) else ""
    must = choice == "required" or bool(name)
    calls = grammar.tool_calls(tools, grammars.tag, must or words is not None, name, parallel)
    if must or words is None:
        return Asked(calls, "tools")
    said = words.form
    rule, rules = f"({calls.rule}) | ({said.rule})", f"{calls.rules}\n{said.rules}"
    return Asked(Form(rule, rules, calls.parts + said.parts, calls=True, notes=calls.notes), words.where)
