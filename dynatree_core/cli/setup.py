"""What `dynatree generate` is asked for, and the models that it loads once for all questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.cli.checks import check_settings, checkable
from dynatree_core.cli.loading import load_drafter, load_target
from dynatree_core.cli.recorded import Recorded
from dynatree_core.plugins.spec import format_stack, parse_stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.models.load import LoadedModel

__all__ = ["Setup"]


@attrs.define(eq=False)
class Setup:
    """What every answer of one command is made with: what was asked for, then also what was loaded."""

    target_name: str | None
    drafter_name: str
    policy: str
    is_json: bool
    is_compared: bool
    recorded: Recorded
    expanded_policy: str | None = attrs.field(default=None, init=False)  # without presets
    options: dict[str, Any] = attrs.field(factory=dict, init=False)  # of every session
    target: LoadedModel | None = attrs.field(default=None, init=False)
    drafter: Any = attrs.field(default=None, init=False)
    tokenizer: PreTrainedTokenizerBase | None = attrs.field(default=None, init=False)

    def load(
        self,
        device: str | None,
        dtype: str,
        weights: str,
        activations: str,
        ignore_eos: bool,
        stop_strings: Sequence[str],
        **settings: Any,
    ) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
        """Load the models, after everything that can be refused without one.

        Returns:
            The target and its tokenizer.
        """
        from dynatree_core.plugins.presets import expand_preset
        from dynatree_core.text.prompt import tokenizer_of

        self.recorded.check()
        self.drafter = check_settings(
            target=self.target_name,
            drafter=self.drafter_name,
            policy=self.policy,
            device=device,
            **checkable(settings),
        )
        specs = [spec for given in parse_stack(self.policy) for spec in expand_preset(given)]
        self.expanded_policy = format_stack(specs)
        self.target = load_target(self.target_name, device, dtype, weights=weights, activations=activations, **settings)
        self.tokenizer = tokenizer_of(self.target)
        if self.drafter is None:
            self.drafter = load_drafter(self.drafter_name, self.target).model
        self.options = {name: value for name, value in settings.items() if value is not None}
        self.options["tokenizer"] = self.tokenizer  # stop strings and some drafters look at text
        if stop_strings:
            self.options["stop_strings"] = list(stop_strings)
        if ignore_eos:
            self.options["eos_token_id"] = []
        self.recorded.open(self.tokenizer)
        return self.target, self.tokenizer
