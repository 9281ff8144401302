"""The bodies of requests, as OpenAI's clients and vLLM's write them.

Values are taken strictly: no text for a number, no NaN. Fields that are not here change nothing, and are told once, but
for those that `drawing.refuse_others` refuses.
"""

from typing import Annotated, Any, Literal, Union

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]  # looked for at every token
Texts = Text | Annotated[list[Text], Field(min_length=1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Json = dict[str, Any]

# What clients send as a matter of course, and what need not be told of.
WITHOUT_A_WORD = {
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "truncation"),
    *("include", "prompt_cache_retention", "stream_options", "id"),
}


def _also(*names: str) -> Any:
    """An optional field under its own name, and another by which LM Studio or Anthropic's servers call it."""
    return Field(None, validation_alias=AliasChoices(*names))


class Body(BaseModel):
    """model: by its name; None for the first."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None


class Part(BaseModel):
    """What stands within a body."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Part):
    include_usage: bool | None = None


class Structured(BaseModel):
    """vLLM's `structured_outputs`: one of these."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: Json | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(Part):
    name: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """Chat's `response_format`, and `text.format` of responses, which holds the schema itself."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Json | None = Field(None, alias="schema")
    name: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self):
        if self.type == "json_schema" and self.schema is None:
            raise ValueError("a json_schema without its schema")
        return self

    @property
    def schema(self) -> Json | None:
        return self.schema_ if self.json_schema is None else self.json_schema.schema_


class Sampling(Body):
    """How an answer is drawn; what is None is as the model's generation_config.json says."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = _also("repetition_penalty", "repeat_penalty")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None


class Formed(BaseModel):
    """vLLM's names, new and old, of the form that an answer must have."""

    structured_outputs: Structured | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None


class Drawing(Sampling, Formed):
    """What chat and plain completions have beside it."""

    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = _also("stop", "stop_sequences")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None


class Reasoning(Part):
    enabled: bool | None = None
    effort: str | None = None


class Thinking(BaseModel):
    """All names of the switch that lets a model think before it answers."""

    enable_thinking: bool | None = None
    open_thinking: bool | None = None
    thinking: bool | Json | None = None
    think: bool | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Json | None = None


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    """A tool that must be called: chat says {"function": {"name"}}, responses {"name"}."""

    type: Literal["function"] = "function"
    function: NamedFunction | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _has_name(self):
        if not self.called:
            raise ValueError("tool_choice without the function's name")
        return self

    @property
    def called(self) -> str | None:
        return self.function.name if self.function else self.name


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class Messages(Thinking):
    """What a prompt is made of."""

    messages: Annotated[list[Json], Field(min_length=1)]
    tools: list[Json] | None = None


class ChatRequest(Drawing, Messages):
    """continue_final_message: vLLM's; the last message is the beginning of the answer."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    continue_final_message: bool | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Drawing):
    """prompt: texts or token ids, or lists of either. add_special_tokens: texts begin as documents do in training."""

    prompt: Union[Texts, TokenIds, Annotated[list[TokenIds], Field(min_length=1)]]  # noqa: UP007
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = _also("max_tokens", "max_completion_tokens")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None


class TextSettings(Part):
    format: ResponseFormat | None = None


class ResponsesRequest(Sampling, Formed, Thinking):
    input: str | Annotated[list[Json], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Json] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    metadata: dict[str, str] | None = None


class EmbeddingRequest(Body):
    """normalize: to length 1, as OpenAI's are."""

    input: Union[Texts, TokenIds, Annotated[list[TokenIds], Field(min_length=1)]]  # noqa: UP007
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool | None = None


class ClassifyRequest(Body):
    """input: of a classifier of pictures data URLs, or parts of messages that are pictures."""

    input: Text | Json | Annotated[list[Text | Json], Field(min_length=1)]


class ScoreRequest(Body):
    """A conversation or several, or a question and its answers (vLLM's names)."""

    messages: Annotated[list[Json | list[Json]], Field(min_length=1)] | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None


class TokenizeRequest(Body, Thinking):
    """A text (llama.cpp calls it `content`), or messages."""

    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Json], Field(min_length=1)] | None = None
    tools: list[Json] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[TokenId]


class TemplateRequest(Body, Messages):
    add_generation_prompt: bool | None = None


class WeightsRequest(Body):
    """SGLang's: a folder of this machine, and what its weights are called in the answers that they make."""

    model_path: Text
    weight_version: str | None = None
    abort_all_requests: Literal[False] | None = None


class ToolCallRequest(BaseModel):
    name: str
    arguments: Json | str = Field(default_factory=dict)
