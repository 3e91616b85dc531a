"""When a generation ends: at an end token, at its length, or where one of generate()'s stopping criteria says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteria, StopStringCriteria

from dynatree_core.errors import ParameterError
from dynatree_core.plugins.params import as_python
from dynatree_core.request.arguments import merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Criterion", "stopping_criteria"]


@attrs.frozen
class Criterion:
    """A stopping criterion of transformers, with the stop reason that it gives a generation."""

    reason: str  # "stop_string", "time" or "criterion"
    is_done: StoppingCriteria  # called with the text [1, tokens] after each new token

    def __call__(self, text: Tensor) -> bool:
        """Whether the generation ends with this text [1, tokens].

        Raises:
            ParameterError: the criterion answers neither True nor False, where generate() fails or looks at its bits.
        """
        answer: Any = self.is_done(text, None)
        try:
            found = torch.as_tensor(answer)
        except (TypeError, ValueError, RuntimeError):  # None, for one, where a `return` was forgotten
            found = torch.empty(0)
        value = found.item() if found.numel() == 1 else None
        if value not in (0, 1):
            name = getattr(self.is_done, "__name__", type(self.is_done).__name__)
            raise ParameterError(
                "a stopping criterion must answer True or False for the one sequence that it is shown, got "
                f"{answer!r:.60} from {name}; return one bool, or a tensor [1] of bool"
            )
        return bool(value)


def stopping_criteria(
    config: GenerationConfig, own: Sequence[StoppingCriteria], tokenizer: PreTrainedTokenizerBase | None
) -> list[Criterion]:
    """The criteria that the settings ask for and the caller's own, as generate() merges them. Time counts from here on.

    Raises:
        ParameterError: stop strings without a tokenizer, or a setting with a value that its criterion refuses.
    """
    asked: dict[str, StoppingCriteria] = {}  # by stop reason
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ParameterError("stop_strings need the target's tokenizer, got none; give it as tokenizer=...")
        try:
            asked["stop_string"] = StopStringCriteria(tokenizer, config.stop_strings)
        except (TypeError, ValueError, AttributeError) as error:
            raise ParameterError(
                f"stop_strings must be a text or several, none empty, got {config.stop_strings!r} with "
                f"{type(tokenizer).__name__} ({error})"
            ) from error
    if config.max_time is not None:
        max_time = as_python(config.max_time)
        if isinstance(max_time, bool) or not isinstance(max_time, int | float) or max_time < 0:
            raise ParameterError(f"max_time must be a number of seconds of at least 0, got {config.max_time!r}")
        asked["time"] = MaxTimeCriteria(max_time)
    reasons = {id(criterion): reason for reason, criterion in asked.items()}
    return [
        Criterion(reasons.get(id(criterion), "criterion"), criterion) for criterion in merged([*asked.values()], own)
    ]
