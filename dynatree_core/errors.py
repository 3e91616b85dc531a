"""Every error that DynaTree raises on purpose: one class per cause, all under `DynaTreeError`.

A message says what must hold, what came instead, and what to do. `InputError` and its children are
mistakes of the caller (the command line exits with 2), everything else happened while running (exit 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynatree_core.report import GenerationResult

__all__ = [
    "BatchError",
    "CacheError",
    "ContextLimitError",
    "DefaultModelError",
    "DrafterError",
    "DynaTreeError",
    "ForwardPassError",
    "GrammarError",
    "InputError",
    "ModelLoadError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "ParameterError",
    "PluginConflictError",
    "PluginLoadError",
    "PolicyError",
    "PromptError",
    "QueueFullError",
    "StackSyntaxError",
    "TreeError",
    "UnknownPluginError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "nearest_match",
]


class DynaTreeError(Exception):
    """Base of all errors of this package.

    `partial` is what had been committed when a generation ended with this error, or None when the
    error came before a generation began. The tokens in it are correct: only verified tokens are committed.
    """

    partial: GenerationResult | None = None


class InputError(DynaTreeError, ValueError):
    """An argument that cannot be used as given."""


class StackSyntaxError(InputError):
    """A policy stack's string that does not parse."""


class UnknownPluginError(InputError):
    """A policy, preset, variant or drafter that no installed package provides."""


class PluginConflictError(DynaTreeError):
    """Two installed packages provide a plugin of the same name."""


class PluginLoadError(DynaTreeError):
    """An installed plugin that cannot be imported or made."""


class ParameterError(InputError):
    """A parameter that a plugin does not have, or a value outside its type or range."""


class GrammarError(ParameterError):
    """A grammar that cannot be followed: nothing here reads it, or no token is left that it allows."""


class PromptError(InputError):
    """A prompt that is empty, not one sequence of integers, or outside the vocabulary."""


class ContextLimitError(InputError):
    """Prompt plus new tokens exceed what the target has positions for."""


class VocabularyMismatchError(InputError):
    """Target and drafter do not speak the same token ids."""


class UnsupportedModelError(InputError):
    """A model on which tree decoding is not known to be exact."""


class ModelLoadError(DynaTreeError):
    """A model that could not be loaded."""


class DefaultModelError(ModelLoadError):
    """The embedded default model is not installed or could not be converted."""


class PolicyError(DynaTreeError):
    """A policy's hook raised or returned something that its contract does not allow."""


class DrafterError(DynaTreeError):
    """A drafter raised or proposed something that its contract does not allow."""


class NonFiniteLogitsError(DynaTreeError):
    """The target's logits contain NaN, so no token can be chosen."""


class ForwardPassError(DynaTreeError):
    """A model that raised in its forward pass."""


class OutOfMemoryError(DynaTreeError):
    """The device has no memory left for the caches or a forward pass."""


class BatchError(DynaTreeError):
    """Some sequences of a batch failed; the others were generated to their ends.

    Attributes:
        errors: by the place of the prompt.
        results: in the prompts' order; for a prompt that failed, what was committed before.
    """

    def __init__(self, message: str, errors: Mapping[int, BaseException], results: Sequence[GenerationResult]) -> None:
        super().__init__(message, errors, results)  # all of them, so that it can be copied and sent to another process
        self.errors = errors
        self.results = results

    def __str__(self) -> str:
        return str(self.args[0])


class QueueFullError(DynaTreeError):
    """An engine's waiting line is full. The request was not taken and can be submitted again later."""


class TreeError(DynaTreeError):
    """An operation that would leave a token tree that is not a tree."""


class CacheError(DynaTreeError):
    """Rows beyond a cache's capacity, or a path that is not in its block."""


def nearest_match(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: " (did you mean 'x'?)", or an empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
