"""Texts that follow a grammar: JSON of a schema, or a regular expression.

llguidance says which tokens may follow a text. It is asked by a logits processor, so each node of a tree is judged with
its own path, and a drafted token that breaks the grammar is one that the target does not want.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from transformers import LogitsProcessor

from dynatree_core.errors import GrammarError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Grammar", "GrammarProcessor"]

PROBED_TOKENS = 2
WHITESPACE = r"[ \t\n\r]{0,20}"  # between JSON's parts: indentation fits, and no model can write blanks for ever


@attrs.frozen
class Grammar:
    """What a text must be; made by `json_schema` or `regex`."""

    kind: str  # "json_schema" or "regex"
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that fulfils this schema; `{}` for any. llguidance documents which keywords it takes.

        Raises:
            GrammarError: it is no mapping, or no text of one.
        """
        try:
            read = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(schema))
        except RecursionError as error:  # and its repr would fail likewise
            raise GrammarError(
                "a JSON schema must not be nested so deeply; name its parts by $defs and $ref"
            ) from error
        except (TypeError, ValueError) as error:
            raise GrammarError(f"a JSON schema must be JSON, got {schema!r:.60} ({error})") from error
        if not isinstance(read, dict):
            raise GrammarError(f"a JSON schema must be a mapping, got {schema!r:.60}")
        return cls("json_schema", json.dumps(read))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that this regular expression matches as a whole, in the syntax of Rust's regex crate."""
        if not isinstance(pattern, str):
            raise GrammarError(f"a regular expression must be a text, got {pattern!r:.60}")
        return cls("regex", pattern)


class GrammarProcessor(LogitsProcessor):
    """Takes away what the grammar does not allow after the new text, for one text at a time.

    Args:
        grammar: what the new text must be.
        tokenizer: the model's, one of the fast ones.
        num_prompt: tokens of the prompt, padding included.
        vocab: size of the vocabulary of the logits.
        eos_token_ids: tokens that end the text: allowed where it is complete.

    Raises:
        GrammarError: llguidance is not installed, or it takes no such grammar or tokenizer; there is no end token.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        num_prompt: int,
        vocab: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._end_ids = sorted(one for one in eos_token_ids if one < vocab)
        self._matcher = _new_matcher(grammar, tokenizer, vocab, self._end_ids)
        self._num_prompt = num_prompt
        self._num_read: int | None = 0  # new tokens that the matcher knows; None: nobody knows how many

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [1, vocab] with -inf for what may not follow the text [1, tokens].

        Raises:
            GrammarError: nothing may follow, since other settings have taken what the grammar allows.
        """
        self._read(input_ids[0, self._num_prompt :].tolist())
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()  # [vocab]
        self._refuse_errors()
        allowed[self._end_ids] = allowed[self._end_ids[0]].clone()  # llguidance knows those that the tokenizer has
        scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        if not bool((scores > -torch.inf).any()):
            raise GrammarError(
                "a token must be left that both the grammar and the other settings allow, got none after "
                f"{self._num_read} tokens; leave out the settings that forbid tokens"
            )
        return scores

    def _read(self, new_ids: list[int]) -> None:
        """Have the matcher know these new tokens."""
        num_read = self._num_read
        self._num_read = None  # should this be broken off, the next call begins from the start
        if num_read is None or num_read > len(new_ids):
            self._matcher.reset()
            num_read = 0
        self._matcher.consume_tokens(new_ids[num_read:])
        self._refuse_errors()
        self._num_read = len(new_ids)

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"a grammar must be one that llguidance can go on with, but: {_said(self._matcher)}")


def _new_matcher(
    grammar: Grammar, tokenizer: PreTrainedTokenizerBase | None, vocab: int, end_ids: Sequence[int]
) -> Any:  # llguidance.LLMatcher
    if not isinstance(grammar, Grammar):
        raise GrammarError(
            f"grammar must be a Grammar, got {grammar!r:.60}; make one by Grammar.json_schema or Grammar.regex"
        )
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise GrammarError(
            f"a grammar needs the package llguidance, which cannot be imported ({error}); pip install "
            "'dynatree[grammar]'"
        ) from error
    if tokenizer is None:
        raise GrammarError("a grammar needs the target's tokenizer, got none; give it as tokenizer=...")
    vocabulary = _vocabulary(tokenizer, vocab, end_ids)
    key = (grammar, vocab, *end_ids)
    last = _last_matchers().get(tokenizer)
    if last is None or last[0] != key:  # the choices of one request have one grammar, which may take long to read
        last = _last_matchers()[tokenizer] = key, _compiled(LLMatcher, grammar, vocabulary)
    return last[1].deep_copy()


def _compiled(LLMatcher: Any, grammar: Grammar, vocabulary: Any) -> Any:  # it is a class
    if grammar.kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(grammar.source, overrides={"whitespace_pattern": WHITESPACE})
    else:
        source = LLMatcher.grammar_from_regex(grammar.source)
    matcher = LLMatcher(vocabulary, source, log_level=0)
    if fault := _said(matcher) or _fault_ahead(matcher):
        raise GrammarError(f"llguidance does not take this {grammar.kind}: {fault}")
    return matcher


def _fault_ahead(matcher: Any) -> str:
    """What goes wrong within the first tokens of a text: most grammars that are too large for llguidance show it there.

    So they are refused in the thread that reads the request, and hold up nobody's step.
    """
    probe = matcher.deep_copy()
    for _ in range(PROBED_TOKENS):
        allowed = probe.compute_logit_bias()  # a byte for each token, 0 where it may not follow
        if probe.is_error() or probe.is_stopped():
            break
        token = next((token for token, byte in enumerate(allowed) if byte), None)
        if token is None:
            return "no token of the vocabulary may come next"
        probe.consume_token(token)
    return _said(probe)


def _said(matcher: Any) -> str:
    """What is wrong, without llguidance's own state, which it adds below."""
    return str(matcher.get_error()).partition("<state>")[0].strip()


@functools.cache
def _last_matchers() -> weakref.WeakKeyDictionary[Any, tuple[object, Any]]:
    """Tokenizer -> the last grammar that was read with it, and its matcher, which has read no text."""
    return weakref.WeakKeyDictionary()


@functools.cache
def _vocabularies() -> weakref.WeakKeyDictionary[Any, dict[object, Any]]:
    """Tokenizer -> what llguidance has made of it, which takes up to a second."""
    return weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int, end_ids: Sequence[int]) -> Any:
    known_ends = [one for one in end_ids if one < len(tokenizer)]
    if not known_ends:
        raise GrammarError(
            f"a grammar needs an end token that the tokenizer knows, for the end of its text, got {list(end_ids)}; "
            "give eos_token_id=..."
        )
    made = _vocabularies().setdefault(tokenizer, {})
    key = (len(tokenizer), vocab, *known_ends)
    if key not in made:
        made[key] = _read_vocabulary(tokenizer, vocab, known_ends)
    return made[key]


def _read_vocabulary(tokenizer: Any, vocab: int, end_ids: list[int]) -> Any:
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=vocab, eos_token=end_ids)
    except Exception as error:  # llguidance names no types of errors
        raise GrammarError(
            f"a grammar needs a tokenizer that llguidance can read, got {type(tokenizer).__name__}: {error}"
        ) from error
