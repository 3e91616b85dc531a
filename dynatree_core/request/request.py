"""The request: all settings of one generation, read and checked before anything runs.

`Options` has a field for each option, as the caller gave it. `Request.parse` checks the options against a target and
returns a `Request`: plain values, which do not change while the text is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor, nn
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from dynatree_core.cache.sink_cache import SinkWindow, refuse_beside
from dynatree_core.errors import ContextLimitError, ParameterError
from dynatree_core.models.architectures import (
    dropped_beyond,
    forward_parameters,
    max_positions,
    num_known_ids,
    vocab_size,
)
from dynatree_core.models.placement import computing_device, num_processes
from dynatree_core.models.wrappers import refuse_own_generate
from dynatree_core.policy.build import build_stack
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.request.arguments import (
    check_callable,
    check_flag,
    checked_list,
    checked_logprobs,
    checked_positions,
    checked_prompt,
    checked_seed,
    end_token_ids,
    fixed_width,
    guessed_mask,
    new_token_limit,
    num_padding,
    refuse_other_inputs,
    resolved_limits,
    settings_of,
)
from dynatree_core.request.defaults import DEFAULT_POLICY
from dynatree_core.request.grammar import Grammar, GrammarProcessor
from dynatree_core.request.limits import Limits
from dynatree_core.request.penalties import penalties
from dynatree_core.request.processors import logits_processors
from dynatree_core.request.stopping import Criterion
from dynatree_core.request.stopping import stopping_criteria as criteria_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Options", "Request"]


@attrs.frozen(eq=False, kw_only=True)
class Options:
    """The options of one generation, unchecked; `dynatree_core.generate` documents each of them."""

    policy: str | object | Sequence[str | object] = DEFAULT_POLICY
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    attention_mask: Tensor | Sequence[int] | None = None
    position_ids: Tensor | Sequence[int] | None = None
    generation_config: GenerationConfig | None = None
    inherit_settings: bool = True
    logits_processor: Sequence[LogitsProcessor] | None = None
    stopping_criteria: Sequence[StoppingCriteria] | None = None
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: Grammar | None = None
    tau: float | None = None
    max_nodes: int | None = None
    max_depth: int | None = None
    max_branch: int = 16
    cache: str | None = None
    exact: str | None = None
    on_prefill: Callable[[int, int], None] | None = None
    observer: Any = None
    on_error: str = "raise"
    settings: Mapping[str, object] = attrs.field(factory=dict)  # generate()'s own, by name

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> Options:
        """Options from keyword arguments: those without a field here are settings of transformers' `generate`."""
        names = set(OPTION_NAMES)
        settings = {name: value for name, value in options.items() if name not in names}
        return cls(**{name: value for name, value in options.items() if name in names}, settings=settings)


OPTION_NAMES = tuple(field.name for field in attrs.fields(Options) if field.name != "settings")


@attrs.frozen(eq=False)
class Request:
    """The checked settings of one generation. It serves one sequence: processors and criteria may have state."""

    given_ids: tuple[int, ...]  # the prompt as it was given, with its padding
    num_padding: int  # of these, at the left
    positions: tuple[int, ...] | None  # of the prompt without padding, where they are not 0, 1, 2, …
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    do_sample: bool
    seed: int | None  # None: torch's global generator
    num_logprobs: int | None  # most probable tokens whose log-probabilities are told with each token's; None: none are
    logits_processors: LogitsProcessorList
    stopping_criteria: Sequence[Criterion]
    stack: PolicyStack
    limits: Limits
    kept: SinkWindow | None  # the part of the text that a bounded cache keeps; None: all of it
    pass_rows: int  # rows that every verification pass has at least
    is_fixed_width: bool  # whether every verification pass has one shape
    on_prefill: Callable[[int, int], None] | None
    observer: Any  # one or several of `dynatree_core.engine.observer`, which checks them; None for none
    on_error: str  # "raise" or "fallback"

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt without its padding."""
        return self.given_ids[self.num_padding :]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, at most."""
        return len(self.given_ids) - self.num_padding + self.max_new_tokens

    @property
    def can_reuse_prefix(self) -> bool:
        """Whether keys and values of other generations may be reused.

        Not with positions of the caller's own, which change them, nor with passes of one shape, since those of other
        shapes may be rounded differently.
        """
        return self.positions is None and not self.is_fixed_width

    @classmethod
    def parse(
        cls,
        target: nn.Module,
        input_ids: Tensor | Sequence[int] | Mapping[str, Tensor],
        options: Options,
        *,
        caller: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_model: bool = False,
        other_options: Sequence[str] = (),
    ) -> Request:
        """Read and check the options; nothing is run.

        Args:
            target: the model that computes the text.
            input_ids: the prompt, [tokens] or [1, tokens], or what a tokenizer returns.
            options: all other options.
            caller: the object that the caller gave as target, such as PEFT's wrapper; its generation config is used.
            tokenizer: the target's.
            trust_model: whether a `generate` on the target that is not transformers' is accepted, as changing nothing.
            other_options: names of further valid options, for the hint in an error message.

        Raises:
            InputError: something that cannot be used.
        """
        if options.inherit_settings and not trust_model:  # without, the target's generate has called
            refuse_own_generate(target)
        if options.on_error not in ("raise", "fallback"):
            raise ParameterError(f"on_error must be 'raise' or 'fallback', got {options.on_error!r}")
        check_flag("inherit_settings", options.inherit_settings)
        check_callable("on_prefill", options.on_prefill)
        vocab = vocab_size(target)
        attention_mask, position_ids = options.attention_mask, options.position_ids
        if isinstance(input_ids, Mapping):  # what a tokenizer returns
            attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            position_ids = input_ids.get("position_ids") if position_ids is None else position_ids
            refuse_other_inputs(input_ids, forward_parameters(target))
            input_ids = input_ids.get("input_ids", ())
        given_ids = checked_prompt(input_ids, num_known_ids(target))
        config = settings_of(
            (target if caller is None else caller) if options.inherit_settings else None,
            options.generation_config,
            options.settings,
            (*OPTION_NAMES, *other_options),
        )
        refuse_apart(target, config, options.seed)
        eos_token_ids = end_token_ids(config, options.eos_token_id)
        if attention_mask is None and isinstance(input_ids, Tensor):  # as generate() does; a list has no padding
            attention_mask = guessed_mask(given_ids, config.pad_token_id, eos_token_ids)
        padding = num_padding(attention_mask, len(given_ids))
        positions = checked_positions(position_ids, len(given_ids))
        positions = positions and positions[padding:]
        if positions == [*range(len(given_ids) - padding)]:
            positions = None  # the default positions
        kept = SinkWindow.parse(options.cache)
        if kept is not None:
            refuse_beside(kept, options.exact, positions)
        max_new_tokens = new_token_limit(
            *_asked_length(options),
            len(given_ids),
            len(given_ids) - padding if positions is None else max(positions) + 1,
            max_positions(target) if kept is None else None,
        )
        if kept is None:
            refuse_dropped_keys(target, len(given_ids), max_new_tokens)
        device = computing_device(target)
        added = penalties(
            options.logit_bias,
            options.presence_penalty,
            options.frequency_penalty,
            num_prompt=len(given_ids),
            vocab=vocab,
            device=device,
        )
        own_processors = checked_list("logits_processor", options.logits_processor, LogitsProcessor)
        if options.grammar is not None:  # last, so that it sees the scores that the others have left
            rules = GrammarProcessor(
                options.grammar, tokenizer, num_prompt=len(given_ids), vocab=vocab, eos_token_ids=eos_token_ids
            )
            own_processors = [*own_processors, rules]
        processors = logits_processors(
            config,
            added,
            own_processors,
            eos_token_ids=eos_token_ids,
            num_prompt=len(given_ids),
            num_padding=padding,
            max_length=len(given_ids) + max_new_tokens,
            vocab=vocab,
            device=device,
        )
        seed = checked_seed(options.seed) if config.do_sample else None
        own_criteria = checked_list("stopping_criteria", options.stopping_criteria, StoppingCriteria)
        criteria = criteria_of(config, own_criteria, tokenizer)
        if any(type(criterion) is EosTokenCriteria for criterion in own_criteria):
            eos_token_ids = frozenset()  # the caller's criterion decides on end tokens
        stack = build_stack(options.policy)
        pass_rows, max_nodes = fixed_width(options.exact, options.max_nodes)
        limits = resolved_limits(stack, options.max_depth, max_nodes, options.tau, options.max_branch, vocab)
        return cls(
            given_ids=tuple(given_ids),
            num_padding=padding,
            positions=None if positions is None else tuple(positions),
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos_token_ids,
            do_sample=config.do_sample,
            seed=seed,
            num_logprobs=checked_logprobs(options.logprobs, vocab),
            logits_processors=processors,
            stopping_criteria=criteria,
            stack=stack,
            limits=limits,
            kept=kept,
            pass_rows=pass_rows,
            is_fixed_width=options.exact is not None,
            on_prefill=options.on_prefill,
            observer=options.observer,
            on_error=options.on_error,
        )


def refuse_dropped_keys(target: nn.Module, num_prompt: int, max_new_tokens: int) -> None:
    """Refuse a text of which generate() would drop keys that the model looks at.

    Raises:
        ContextLimitError: naming the field of the configuration by which it drops them.
    """
    found = dropped_beyond(target)
    # keys are dropped behind a pass, and the last token goes through none
    if found is not None and max_new_tokens > 1 and num_prompt + max_new_tokens - 1 > found[1]:
        field, limit = found
        raise ContextLimitError(
            f"generate() keeps the last {limit} tokens of the target's cache, by its config.{field}, though its "
            f"attention looks back all the way; got {num_prompt} + {max_new_tokens} tokens. Set model.config.{field} "
            f"to None, with which both see all of them, or have {limit + 1} tokens at most"
        )


def refuse_apart(target: nn.Module, config: GenerationConfig, seed: int | None) -> None:
    """Refuse what each of the processes that share a model would decide by itself.

    Raises:
        ParameterError: naming it.
    """
    number = num_processes(target)
    if number > 1 and config.do_sample and seed is None:
        raise ParameterError(
            f"sampling by {number} processes that share a model needs the same seed= in each, got none"
        )
    if number > 1 and config.max_time is not None:
        raise ParameterError(
            f"{number} processes that share a model must stop at the same token, so max_time cannot be used; give "
            "max_new_tokens"
        )


def _asked_length(options: Options) -> tuple[int | None, int | None]:
    """max_new_tokens and max_length: from the call, else from the given configuration."""
    config = options.generation_config
    if options.max_new_tokens is not None or options.max_length is not None or config is None:
        return options.max_new_tokens, options.max_length
    return config.max_new_tokens, config.max_length if config.max_new_tokens is None else None
