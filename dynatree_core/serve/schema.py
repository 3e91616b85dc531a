"""The bodies of requests. Types are strict and unknown fields an error, so that nothing is taken for something else."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dynatree_core.serve.refused import without_neutral

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "Message", "OwnFields", "StreamOptions", "TokenizeBody"]

Stop = Annotated[str, Field(min_length=1, max_length=256)]
FIRST_FAULT = Field(fail_fast=True)  # of a list: what is wrong with its other items is not collected
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], FIRST_FAULT]
SeveralPrompts = Annotated[list[str], FIRST_FAULT] | Annotated[list[TokenIds], FIRST_FAULT]
MOST_BIASES = 1024
LEAST_TEMPERATURE = 1e-5  # logits divided by less may be no numbers


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, body: Any) -> Any:
        return without_neutral(body) if isinstance(body, dict) else body


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = False  # a chunk with the usage comes last
    continuous_usage_stats: bool = False  # every chunk has that of what has come by then, as vLLM has it


class OwnFields(Body):
    """What OpenAI's API does not have: how this answer is drafted. It has the same tokens with any of them."""

    policy: str | None = None  # one of those that the server allows
    drafter: str | None = None  # likewise
    steps: bool = False  # each chunk of a stream says how its tokens came about
    trees: bool = False  # each chunk of a stream has the trees of its iterations


class NamedSchema(Body):
    """A JSON schema, as `response_format` has it."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True  # an answer fulfils it with any value


class ResponseFormat(Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    """The same as vLLM has it; one of the two."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None


class GenerationBody(Body):
    """What completions and chat completions have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: all tokens
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # beyond, logits would be no numbers
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)  # stands in the log
    dynatree: OwnFields = Field(default_factory=OwnFields)

    @field_validator("temperature")
    @classmethod
    def _must_leave_numbers(cls, temperature: float | None) -> float | None:
        if temperature and temperature < LEAST_TEMPERATURE:
            raise ValueError(f"it must be 0, which takes the most probable token, or at least {LEAST_TEMPERATURE}")
        return temperature

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _must_be_short(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and len(bias) > MOST_BIASES:  # before each of them is looked at
            raise ValueError(f"it may name {MOST_BIASES} tokens at most")
        return bias

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives each token's log-probability comes with; None: there are no log-probabilities."""
        return None

    @property
    def num_tokens_asked(self) -> int | None:
        """The most tokens that an answer may have, where the request says so."""
        return self.max_tokens

    @property
    def tokens_field(self) -> str:
        """The field that says, or could say, how many that are."""
        return "max_tokens"


class CompletionBody(GenerationBody):
    """The body of `/v1/completions`."""

    prompt: str | TokenIds | Annotated[SeveralPrompts, Field(min_length=1)]

    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or all(isinstance(token_id, int) for token_id in prompt)
        return [prompt] if is_one else prompt


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Function(Body):
    """What a tool does."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema, which the model is shown
    strict: bool = False


class Tool(Body):
    """Something that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionCall(Body):
    """What was called, and with what."""

    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _must_be_a_mapping(cls, text: str) -> str:
        try:
            is_mapping = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_mapping = False
        if not is_mapping:
            raise ValueError("arguments must be a JSON object")
        return text


class Call(Body):
    """One call that the model has made before."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: with arguments that are read."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FIRST_FAULT] = ""
    name: str | None = Field(None, max_length=64)  # of who says it, where the template shows it
    tool_calls: list[Call] = Field(default_factory=list, fail_fast=True)  # of an assistant
    tool_call_id: str | None = None  # of a tool: which call it answers

    @model_validator(mode="after")
    def _must_say_something(self) -> Message:
        if not self.tool_calls and "content" not in self.model_fields_set:
            raise ValueError("a message must have a content, or tool_calls")
        return self

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """All but the content, as chat templates take it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {field: value for field, value in more.items() if value is not None}


class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=128, fail_fast=True)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TokenizeBody(Body):
    """The body of `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FIRST_FAULT] | None = Field(None, min_length=1)
    add_special_tokens: bool = True  # of `prompt`; a conversation has those that its template writes
    add_generation_prompt: bool = True  # of `messages`: whether the beginning of an answer follows
