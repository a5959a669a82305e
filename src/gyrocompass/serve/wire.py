"""What clients send: OpenAI's requests, checked, and turned into what engines understand.

Fields that OpenAI has and that change nothing here (`store`, `metadata`, `service_tier`, ...) are taken and
let be; a field that would change the answer and is not supported is refused, never ignored. Three are ours,
in any request: `slice` (what sort of question it is; policies and figures go by it), `deadline_s`,
`consent` (whether the exchange may become training data) and `webhook` (called when a person has decided).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)

from gyrocompass.core.errors import GyroError
from gyrocompass.model.decoding import Decoding
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.webhooks import may_be_called

MOST_ALTERNATIVES = 20
MOST_PROMPTS = 2048
MOST_SAMPLES = 128
MOST_STOPS = 16

M = TypeVar("M", bound=BaseModel)

TokenId = Annotated[int, Field(ge=0, strict=True)]
Prompt = StrictStr | list[TokenId]


def _callable(url: str) -> str:
    if not may_be_called(url):
        raise ValueError("webhook is an https URL, or one of this machine")
    return url


class _Request(BaseModel):
    """What every request may carry."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, cache_strings="keys")

    model: str = Field(default="", description="one of /v1/models")
    user: str | None = None
    slice: str = Field(default="", max_length=200)
    deadline_s: float | None = Field(default=None, gt=0, le=86400)
    consent: bool = False
    webhook: Annotated[str, Field(max_length=2000), AfterValidator(_callable)] | None = None


class _Sampled(_Request):
    """What both kinds of generation take."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StrictStr | list[StrictStr] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        stops = self.stops()
        if len(stops) > MOST_STOPS or not all(stops):
            raise ValueError(f"stop is at most {MOST_STOPS} texts, none of them empty")
        for token, bias in (self.logit_bias or {}).items():
            if not token.isdecimal() or not -100 <= bias <= 100:
                raise ValueError("logit_bias maps token ids to numbers from -100 to 100")
        return self

    def stops(self) -> tuple[str, ...]:
        """As a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def biases(self) -> dict[int, float]:
        """Added to logits, by token id."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    def decoding(self, **constraint: Any) -> Decoding:
        """The controls, as the engine takes them.

        Raises:
            Failure: controls that do not go together.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        given: dict[str, Any] = {
            "temperature": temperature,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "stop": self.stops(),
            **constraint,
        }
        if temperature > 0:  # OpenAI's clients send top_p beside a temperature of 0, where it says nothing
            given |= {"top_p": self.top_p, "min_p": self.min_p or None}
            given |= {"top_k": None if self.top_k in (None, -1, 0) else self.top_k}
        controls = tuple((name, value) for name, value in given.items() if value is not None)
        try:
            return Decoding.model_validate(dict(controls)) if constraint else _decoding(controls)
        except ValidationError as error:
            raise Failure(400, _first(error)) from error

    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


@functools.lru_cache(maxsize=256)
def _decoding(controls: tuple[tuple[str, Any], ...]) -> Decoding:
    """Most clients ask with the same controls each time."""
    return Decoding.model_validate(dict(controls))


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool | None = False


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: Prompt | list[Prompt] = Field(description="text, token ids, or a list of either")
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _only_what_is_done(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not supported: put the text and its sentinels into the prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported: ask for n and choose")
        if not self.prompt or len(self.prompts()) > MOST_PROMPTS or not all(self.prompts()):
            raise ValueError(f"prompt is 1 to {MOST_PROMPTS} texts or lists of token ids, none of them empty")
        if self.stream and len(self.prompts()) * (self.n or 1) > 1 and self.echo:
            raise ValueError("a stream with echo is of one prompt and n = 1")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which is of use with echo alone")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message; others than texts are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. A tool's answer, and the calls before it, go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the {self.role} needs content")
        return self

    def text(self) -> str:
        """The content in one piece."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """For a chat template: `developer` is `system` there, parts are one text."""
        role = "system" if self.role == "developer" else self.role
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        calls = (
            {"tool_calls": [_with_parsed_arguments(call) for call in self.tool_calls]}
            if self.tool_calls
            else {}
        )
        return {**extra, "role": role, "content": self.text(), **calls}


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Templates write arguments as JSON themselves: they want the object that clients send as a text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return dict(call)


class JsonSchema(BaseModel):
    """Of a response format."""

    name: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("response_format of type json_schema needs json_schema.schema")
        return self


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _only_what_is_done(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice is auto or none: a tool cannot be forced")
        for tool in self.tools or []:
            if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
                raise ValueError('a tool is {"type": "function", "function": {"name": ..., ...}}')
        if (self.model_extra or {}).get("functions"):
            raise ValueError("functions is no longer a field: use tools")
        return self

    def limit(self) -> int | None:
        """Of new tokens."""
        return self.max_completion_tokens or self.max_tokens

    def constraint(self) -> dict[str, Any]:
        """Of the response format, for `decoding`."""
        if self.response_format is None or self.response_format.type == "text":
            return {}
        if self.response_format.type == "json_object":
            return {"json_schema": {"type": "object"}}
        assert self.response_format.json_schema is not None
        return {"json_schema": self.response_format.json_schema.schema_}


class InputText(BaseModel):
    """A part of a question's input or instructions."""

    type: Literal["input_text", "text"] = "input_text"
    text: str


class InputMessage(BaseModel):
    """One message of what is to be judged."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]

    def text(self) -> str:
        """The content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Question(BaseModel):
    name: str | None = None
    instructions: str | list[InputText]

    def asked(self) -> str:
        """The instructions in one piece."""
        if isinstance(self.instructions, str):
            return self.instructions
        return "".join(part.text for part in self.instructions)


class Predicate(_Question):
    """Whether a statement about the input is true."""

    type: Literal["predicate"]


class Option(BaseModel):
    """One of the choices."""

    value: StrictStr | StrictBool
    description: str = ""


class Choice(_Question):
    """Which of several."""

    type: Literal["choice"]
    choices: list[Option] = Field(min_length=2, max_length=255)

    @model_validator(mode="after")
    def _differ(self) -> Choice:
        if len({(type(option.value), option.value) for option in self.choices}) < len(self.choices):
            raise ValueError("each choice must be unique")
        return self


class Level(BaseModel):
    """A step of a scale, the lowest first."""

    label: str
    description: str = ""


class Score(_Question):
    """How much, on a scale."""

    type: Literal["score"]
    levels: list[Level] = Field(min_length=2, max_length=10)


Question = Annotated[Predicate | Choice | Score, Field(discriminator="type")]


class DecisionRequest(_Request):
    """POST /v1/decisions."""

    input: str | list[InputMessage]
    questions: list[Question] = Field(min_length=1, max_length=400)

    def text(self) -> str:
        """The input in one piece."""
        if isinstance(self.input, str):
            return self.input
        return "\n".join(f"{message.role}: {message.text()}" for message in self.input)


class ModerationRequest(_Request):
    """POST /v1/moderations."""

    input: StrictStr | list[StrictStr | TextPart] = Field(description="a text or several")

    def texts(self) -> list[str]:
        """One entry per text."""
        if isinstance(self.input, str):
            return [self.input]
        return [one if isinstance(one, str) else one.text for one in self.input]


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text, or messages as a chat puts them before the model."""

    prompt: StrictStr | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: Literal[True] = True

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self

    def text(self) -> str | list[dict[str, Any]]:
        """What is to be tokenised."""
        if self.messages is not None:
            return [message.plain() for message in self.messages]
        assert self.prompt is not None, "checked when it was read"
        return self.prompt


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    tokens: list[TokenId]


class ThumbRequest(BaseModel):
    """POST /v1/feedback: whether the user liked an answer."""

    id: str = Field(pattern=r"^(?:[a-z]+-)?[0-9a-f]{32}$")
    """Of the answer, as it came, with or without what stands before the dash."""
    thumb: Literal["up", "down"]


def read(kind: type[M], body: bytes) -> M:
    """A request's body as one of the above.

    Raises:
        Failure: 400, saying which field and why.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise Failure(400, _first(error), param=_place(error)) from error


def _place(error: ValidationError) -> str | None:
    """The first mistake's place, as OpenAI writes it: messages.0.content."""
    place = [str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"]]
    return ".".join(part for part in place if not part[:1].isupper() and "[" not in part) or None


def _first(error: ValidationError) -> str:
    """The first mistake in words."""
    found = error.errors(include_url=False, include_input=False)
    said = found[0]["msg"].removeprefix("Value error, ")
    place = _place(error)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{place}: {said}{more}" if place else f"{said}{more}"


def refused(error: GyroError) -> Failure:
    """A mistake that an engine found in a request."""
    return Failure(400, str(error))


def texts_of(messages: Sequence[ChatMessage]) -> str:
    """A conversation as plain text, for gates in front of an upstream whose template is not known."""
    return "\n".join(f"{message.role}: {message.text()}" for message in messages)


BODIES = (
    ChatRequest, CompletionRequest, DecisionRequest, ModerationRequest, TokenizeRequest, DetokenizeRequest,
    ThumbRequest,
)  # fmt: skip
"""What a request can hold, for the document."""
