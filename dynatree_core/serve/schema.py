"""The bodies of requests. Types are strict and unknown fields an error, so that nothing is taken for something else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dynatree_core.serve.refused import without_neutral

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "Message", "OwnFields", "StreamOptions", "TokenizeBody"]

Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = list[Annotated[int, Field(ge=0)]]


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


class OwnFields(Body):
    """What OpenAI's API does not have: how this answer is drafted. It has the same tokens with any of them."""

    policy: str | None = None  # one of those that the server allows
    drafter: str | None = None  # likewise


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
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # stands in the log
    dynatree: OwnFields = Field(default_factory=OwnFields)

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_tokens_asked(self) -> int | None:
        """The most tokens that an answer may have, where the request says so."""
        return self.max_tokens


class CompletionBody(GenerationBody):
    """The body of `/v1/completions`."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]

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


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def num_tokens_asked(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeBody(Body):
    """The body of `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True  # of `prompt`; a conversation has those that its template writes
    add_generation_prompt: bool = True  # of `messages`: whether the beginning of an answer follows
