"""From a request's body to requests of an engine: prompts to tokens, fields to options of `generate`."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.errors import ContextLimitError, GrammarError, InputError, ParameterError, PromptError
from dynatree_core.models.architectures import max_positions
from dynatree_core.request.request import Request
from dynatree_core.serve.constraints import form_options
from dynatree_core.serve.errors import ApiError, refused
from dynatree_core.serve.schema import ChatBody, CompletionBody, GenerationBody, Message, TokenizeBody
from dynatree_core.serve.text import StopTextCriterion
from dynatree_core.text.prompt import chat_text, text_ids
from dynatree_core.text.reading import checked_text
from dynatree_core.text.stream import decode_text
from dynatree_core.text.tools import ToolForm, ToolText, form_of
from dynatree_core.trace.live import LiveTrees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.engine.engine import Engine
    from dynatree_core.engine.observer import Observer
    from dynatree_core.serve.settings import Settings

__all__ = ["Asked", "Reader"]

WARM_UP_TOKENS = 8
MOST_LOGPROBS = 100_000  # of an answer, which nobody may read; some 100 bytes each in JSON, ten times that in memory
PERHAPS_NOT_SHOWN = ("name", "tool_calls")  # fields of messages that few templates look at
COMPLETION_TOKENS = 16  # of `/v1/completions` where the request does not say; OpenAI's own


@attrs.frozen(eq=False)
class Asked:
    """One body, read: which engine computes it, and a request of that engine for each choice."""

    drafter: str
    policy: str
    requests: tuple[Request, ...]  # in the order of the choices
    stops: tuple[str, ...]
    tool_form: ToolForm | None = None  # how the model writes calls of tools, where it was given some
    has_steps: bool = False  # whether chunks say how their tokens came about
    trees: tuple[LiveTrees, ...] = ()  # of each choice; none where they were not asked for

    def new_tool_text(self) -> ToolText | None:
        """What takes the calls out of one answer, where there may be some."""
        return None if self.tool_form is None else ToolText(self.tool_form)

    def line(self) -> dict[str, object]:
        """What the log says of it: nothing of the prompts but their lengths."""
        num_prompt = sum(len(request.prompt_ids) for request in self.requests)
        return {
            "policy": self.policy,
            "drafter": self.drafter,
            "choices": len(self.requests),
            "prompt_tokens": num_prompt,
            "max_tokens": self.requests[0].max_new_tokens,
        }


@attrs.frozen(eq=False)
class Reader:
    """Reads bodies for engines of one target. One thread may use it at a time: it has its own tokenizer.

    What it makes for engines, such as the search for stop texts, is called by their thread and has their tokenizer.
    """

    engines: dict[str, Engine]  # by the name of their drafter
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    observers: Mapping[str, Observer]  # of each engine, where somebody watches

    def completion(self, body: CompletionBody) -> Asked:
        """Raises: ApiError, InputError: what cannot be honoured."""
        self._check(body, len(body.prompts))
        with blamed_on("prompt", body):
            prompts = [self.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
            return self._asked(body, prompts, COMPLETION_TOKENS)

    def chat(self, body: ChatBody) -> Asked:
        """Raises: ApiError, InputError: what cannot be honoured."""
        if body.top_logprobs is not None and not body.logprobs:
            message = "'top_logprobs' is about log-probabilities; set 'logprobs' to true, or leave it out"
            raise refused("top_logprobs", message)
        self._check(body, 1)
        with blamed_on("messages", body):
            self._check_template()
            tools = self.tools_of(body)
            form = None if tools is None else form_of(self.tokenizer, tools)
            prompt_ids = self.conversation_ids(body.messages, tools=tools)
            return attrs.evolve(self._asked(body, [prompt_ids], None), tool_form=form)

    def tokenized(self, body: TokenizeBody) -> list[int]:
        """Raises: ApiError, InputError: what cannot be read."""
        if body.model is not None:
            self.check_model(body.model)
        if body.messages is not None and body.prompt is None:
            return self.conversation_ids(body.messages, begins_answer=body.add_generation_prompt)
        if body.prompt is None or body.messages is not None:
            raise refused("prompt", "either 'prompt' or 'messages' must be given, and not both; leave one of them out")
        return self.prompt_ids(body.prompt, has_special_tokens=body.add_special_tokens)

    def warm_ups(self) -> list[Asked]:
        """A short request for each drafter and policy."""
        prompt_ids = self.prompt_ids("The") or [0]
        return [
            Asked(
                drafter,
                policy,
                (engine.request(prompt_ids, policy=policy, max_new_tokens=WARM_UP_TOKENS, **self.settings.limits),),
                (),
            )
            for drafter, engine in self.engines.items()
            for policy in self.settings.policies
        ]

    def prompt_ids(self, text: str, *, has_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        return list(self.tokenizer(checked_text(text, "prompt"), add_special_tokens=has_special_tokens).input_ids)

    def tools_of(self, body: ChatBody) -> list[dict[str, Any]] | None:
        """The tools that the model is shown.

        Raises:
            ApiError: the template shows them to no model, or what is asked about calls cannot be made sure of.
        """
        if body.tool_choice not in (None, "none", "auto"):
            raise refused("tool_choice", "'tool_choice' must be 'none' or 'auto', since calls cannot be enforced here")
        if not body.tools or body.tool_choice == "none":
            return None
        if not body.parallel_tool_calls:
            raise refused("parallel_tool_calls", "the model may write several calls at once; leave it out, or true")
        if any(tool.function.strict for tool in body.tools):
            raise refused("tools", "arguments are not held to a tool's schema here; leave out 'strict'")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        try:
            form_of(self.tokenizer, tools)
        except InputError as error:
            raise refused("tools", str(error)) from error
        return tools

    def conversation_ids(
        self, messages: list[Message], *, begins_answer: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The tokens of a conversation, through the model's chat template.

        Raises:
            ApiError: there is no template, or it shows the model nothing of what a message says, or no tools.
            InputError: the template refuses the conversation, or fails with it.
        """
        self._check_template()
        said = [one.for_template() | {"content": checked_text(one.text, "messages")} for one in messages]
        text = chat_text(said, self.tokenizer, begins_answer=begins_answer, tools=tools)
        if tools is not None and self._is_same(said, text, begins_answer=begins_answer):
            message = "the model's chat template shows tools in no conversation of this kind; leave them out"
            raise refused("tools", message, code="unsupported_parameter")
        for what, bare in without_fields(said):
            if self._is_same(bare, text, begins_answer=begins_answer, tools=tools):
                message = f"the model's chat template does nothing with the {what}; leave it out"
                raise refused("messages", message, code="unsupported_parameter")
        return text_ids(text, self.tokenizer)

    def _check_template(self) -> None:
        if self.tokenizer.chat_template is None:
            message = "the model has no chat template, so it can hold no conversation; ask /v1/completions"
            raise refused("messages", message, code="no_chat_template")

    def _is_same(self, said: list[dict[str, Any]], text: str, **options: Any) -> bool:
        """Whether the template writes this text of a conversation."""
        try:
            return chat_text(said, self.tokenizer, **options) == text
        except InputError:  # it refuses the conversation so, or fails: it does look at what is missing
            return False

    def check_model(self, name: str) -> None:
        """Refuse another model's name."""
        if name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            message = f"the model '{name:.100}' is not served here; there is: {known}"
            raise ApiError(404, message, "model", "model_not_found")

    def _check(self, body: GenerationBody, num_prompts: int) -> None:
        """Refuse what can be told before a prompt is read, which may take long."""
        self.check_model(body.model)
        if num_prompts * body.n > self.settings.max_choices:
            message = (
                f"a request may ask for {self.settings.max_choices} choices at most, got {num_prompts} prompts and "
                f"n={body.n}; ask in several requests"
            )
            raise refused("n", message)
        if body.stream_options is not None and not body.stream:
            raise refused("stream_options", "'stream_options' is about a stream; set 'stream' to true, or leave it out")

    def _asked(self, body: GenerationBody, prompts: list[list[int]], usual_tokens: int | None) -> Asked:
        drafter = chosen("drafter", body.dynatree.drafter, self.settings.drafters)
        policy = chosen("policy", body.dynatree.policy, self.settings.policies)
        engine, seed = self.engines[drafter], first_seed(body)
        self._check_chunks(body)
        form = form_options(body)
        lengths = [self._max_tokens(body, len(prompt_ids), usual_tokens) for prompt_ids in prompts]
        if body.min_tokens > min(lengths):
            message = (
                f"'min_tokens' must be at most '{body.tokens_field}', {min(lengths)}, got {body.min_tokens}; lower it"
            )
            raise refused("min_tokens", message)
        if body.num_logprobs is not None:
            refuse_large(body, lengths)
        made, trees = [], []
        for prompt_ids, num_tokens in zip(prompts, lengths, strict=True):
            for choice in range(body.n):
                options = self._options(body, prompt_ids) | form
                watching = [self.observers[drafter]] if drafter in self.observers else []
                if body.dynatree.trees:
                    trees.append(LiveTrees())
                    watching.append(trees[-1].observer)
                options |= {"seed": seed + choice, "observer": watching or None}
                made.append(engine.request(prompt_ids, policy=policy, max_new_tokens=num_tokens, **options))
        return Asked(
            drafter,
            policy,
            tuple(made),
            tuple(body.stops),
            has_steps=body.dynatree.steps,
            trees=tuple(trees),
        )

    def _check_chunks(self, body: GenerationBody) -> None:
        """Refuse trees where the server shows none, and what chunks carry where there are none."""
        if body.dynatree.trees and not self.settings.shows_trees:
            message = "this server shows no trees (--no-trees); leave 'dynatree.trees' out"
            raise refused("dynatree.trees", message, code="not_allowed")
        for name in ("steps", "trees"):
            if getattr(body.dynatree, name) and not body.stream:
                message = f"'dynatree.{name}' is about the chunks of a stream; set 'stream' to true, or leave it out"
                raise refused(f"dynatree.{name}", message)

    def _max_tokens(self, body: GenerationBody, num_prompt: int, usual: int | None) -> int:
        """The most tokens that an answer may have.

        Raises:
            ApiError: it asks for more than the server allows, or than the context has room for behind the prompt.
        """
        limit, asked = self.settings.max_tokens, body.num_tokens_asked
        if asked is not None and asked > limit:
            raise refused(
                body.tokens_field, f"an answer may have {limit} tokens at most here, got {asked}; ask for less"
            )
        context = max_positions(next(iter(self.engines.values())).target)
        room = limit if context is None else max(1, context - num_prompt)
        found = asked if asked is not None else min(limit, room, room if usual is None else usual)
        if context is not None and num_prompt + found > context:
            raise refused(
                "messages" if isinstance(body, ChatBody) else "prompt",
                # the words by which clients know that a conversation is to be shortened, and the code
                f"this model's maximum context length is {context} tokens, got {num_prompt} of the prompt and {found} "
                f"of the answer; {shorter(context, num_prompt, body.tokens_field)}",
                code="context_length_exceeded",
            )
        return found

    def _options(self, body: GenerationBody, prompt_ids: list[int]) -> dict[str, Any]:
        """What a body says beside prompt, length and policy, as options of `generate` (docs/serve.md has the table)."""
        options = self._sampling(body) | self.settings.limits | {"on_error": self.settings.on_error}
        if body.num_logprobs is not None:
            options["logprobs"] = body.num_logprobs
        if body.repetition_penalty is not None:
            options["repetition_penalty"] = body.repetition_penalty
        if body.min_tokens:
            options["min_new_tokens"] = body.min_tokens
        if body.ignore_eos:
            options["eos_token_id"] = []
        if body.stops:
            options["stopping_criteria"] = [StopTextCriterion(self.engines_decode, body.stops, len(prompt_ids))]
        return options

    def _sampling(self, body: GenerationBody) -> dict[str, Any]:
        config: Any = next(iter(self.engines.values())).target.generation_config
        temperature = body.temperature
        if temperature is None:
            temperature = config.temperature if config.temperature is not None else 1.0
        if temperature == 0:
            return {"do_sample": False}
        top_k = body.top_k if body.top_k is not None else config.top_k
        options = {"do_sample": True, "temperature": temperature, "top_k": max(top_k or 0, 0)}
        given = {"top_p": body.top_p, "min_p": body.min_p}
        return options | {name: value for name, value in given.items() if value is not None}

    def engines_decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special ones left out, for the engines' thread."""
        tokenizer = next(iter(self.engines.values())).tokenizer
        assert tokenizer is not None, "a server reads texts"
        return decode_text(tokenizer, token_ids)


def without_fields(said: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What the template may not show, in words, and the conversation without it: a field of one kind of message.

    A template may show a tool's name and no user's, or calls only where there is no text. By kinds and not one by one,
    since each is read through the template, and a conversation may be long.
    """
    kinds = [kind_of(one) for one in said]
    for field in PERHAPS_NOT_SHOWN:
        for kind in dict.fromkeys(kind for kind in kinds if field in kind):
            bare = [
                {name: value for name, value in one.items() if its_kind != kind or name != field}
                for one, its_kind in zip(said, kinds, strict=True)
            ]
            yield f"'{field}' of a message such as messages.{kinds.index(kind)}", bare


def kind_of(message: dict[str, Any]) -> tuple[str, ...]:
    """The role of a message, and in which fields it says something."""
    return (message["role"], *(field for field in ("content", *PERHAPS_NOT_SHOWN) if message.get(field)))


@contextlib.contextmanager
def blamed_on(param: str, body: GenerationBody) -> Iterator[None]:
    """What is wrong with a prompt, a grammar or another option, as an error that names its field."""
    try:
        yield
    except PromptError as error:
        raise refused(param, str(error)) from error
    except ContextLimitError as error:  # of a drafter
        raise refused(param, str(error), code="context_length_exceeded") from error
    except GrammarError as error:
        raise refused(
            "response_format" if body.structured_outputs is None else "structured_outputs", str(error)
        ) from error
    except ParameterError as error:  # which begins with the option's name
        name = str(error).partition(" ")[0]
        raise ApiError(400, str(error), name if name in type(body).model_fields else None, "invalid_value") from error


def shorter(context: int, num_prompt: int, tokens_field: str) -> str:
    """What to do where prompt and answer have more tokens than the context."""
    if num_prompt < context:
        return f"shorten the prompt, or give a {tokens_field} of {context - num_prompt} at most"
    return f"shorten the prompt to {context - 1} tokens at most"


def refuse_large(body: GenerationBody, lengths: list[int]) -> None:
    """Refuse an answer with more log-probabilities than are kept for one client at once.

    Those of a stream are kept, too, while the client does not read it.

    Args:
        body: that asks for log-probabilities.
        lengths: the most tokens of an answer to each prompt.
    """
    assert body.num_logprobs is not None, "they are asked for"
    of_a_token = body.n * (1 + body.num_logprobs)
    num_logprobs = sum(lengths) * of_a_token
    if num_logprobs <= MOST_LOGPROBS:
        return
    fitting = MOST_LOGPROBS // (of_a_token * len(lengths))
    told = "" if body.num_tokens_asked is not None else f", where max_tokens was not given and is {max(lengths)}"
    fix = f"a max_tokens of {fitting}, or ask for fewer choices or alternatives" if fitting else "fewer of them"
    message = (
        f"an answer may have {MOST_LOGPROBS} log-probabilities at most, and this one could have {num_logprobs} "
        f"(choices × max_tokens × (1 + alternatives){told}); give {fix}"
    )
    raise refused("logprobs", message)


def chosen(param: str, name: str | None, allowed: tuple[str, ...]) -> str:
    """The name that was asked for, which must be one of those that the server allows; the first where none was."""
    if name is not None and name not in allowed:
        message = f"'{param}' must be one of those that this server allows, got '{name:.100}'; there are: "
        raise refused(f"dynatree.{param}", message + ", ".join(allowed), code="not_allowed")
    return allowed[0] if name is None else name


def first_seed(body: GenerationBody) -> int:
    """The seed of the first choice; the others have the next ones."""
    return secrets.randbits(62) if body.seed is None else body.seed % 2**62
