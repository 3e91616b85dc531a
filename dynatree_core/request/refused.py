"""Settings of `generate` that tree decoding does not support, each with the only accepted value and the reason."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from transformers import GenerationConfig

__all__ = ["REFUSED", "RefusedSetting", "refused_settings"]


@attrs.frozen
class RefusedSetting:
    """One setting of transformers' GenerationConfig."""

    neutral: object  # the value that turns the setting off, as None does too
    reason: str
    # whether generate()'s decoding loop acts on it; if not, generate() has acted on it before it calls a custom loop
    is_in_loop: bool


REFUSED = {
    "constraints": RefusedSetting(None, "constrained search takes beams, and a tree goes on from one text", True),
    "dola_layers": RefusedSetting(None, "DoLa compares the logits of layers, and a pass gives those of the last", True),
    "encoder_no_repeat_ngram_size": RefusedSetting(0, "there is no encoder", False),
    "encoder_repetition_penalty": RefusedSetting(1, "the prompt is no encoder's input", False),
    "force_words_ids": RefusedSetting(None, "constrained search takes beams, and a tree goes on from one text", True),
    "guidance_scale": RefusedSetting(1, "guidance takes a second pass over a text without the prompt", True),
    "num_beams": RefusedSetting(1, "beams go on from several texts, and a tree from one", True),
    "num_return_sequences": RefusedSetting(1, "a call gives one text", False),
    "output_attentions": RefusedSetting(False, "passes over trees keep no attention weights", True),
    "output_hidden_states": RefusedSetting(False, "passes over trees keep no hidden states", True),
    "penalty_alpha": RefusedSetting(0, "contrastive search compares hidden states, which are not kept", True),
    "token_healing": RefusedSetting(False, "it changes the prompt before the first token", False),
}


def refused_settings(config: GenerationConfig) -> Iterator[tuple[str, object, RefusedSetting]]:
    """The unsupported settings that a configuration turns on: name, value and entry of the table."""
    for name, setting in REFUSED.items():
        value = getattr(config, name, None)
        if value not in (None, setting.neutral):
            yield name, value, setting
