"""Arguments of generate() that it keeps from a function given as `custom_generate`, and where they are found.

There is no public way to them. Without its streamer a caller would wait for ever; without the tokenizer generate()
itself refuses stop strings before it calls the function.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import GenerationMixin

__all__ = ["WITHOUT_A_WAY", "SignatureWithTokenizer", "callers_arguments"]

# arguments for which there is no way -> what to do instead
WITHOUT_A_WAY = {
    "assistant_model": "give the small model as drafter=",
    "synced_gpus": "leave it out: tree decoding runs in one process",
}

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


def callers_arguments(model: nn.Module) -> Mapping[str, Any]:
    """The streamer, and what there is no way for, as the generate() that calls has them."""
    frame = inspect.currentframe()
    while frame is not None:  # there may be functions of the caller's between, such as a lambda or a decorator
        if frame.f_code is _GENERATE and frame.f_locals.get("self") is model:
            return {name: frame.f_locals.get(name) for name in ("streamer", *WITHOUT_A_WAY)}
        frame = frame.f_back
    return {}


class SignatureWithTokenizer(inspect.Signature):
    """The signature of a function with an argument `tokenizer`, which generate() then hands on to the function.

    generate() takes the tokenizer out of its settings, reads the names in the signature, and looks for each of them in
    the settings. It makes its stopping criteria with what it finds. So the tokenizer is put back while it reads.
    """

    @property
    def parameters(self) -> MappingProxyType[str, inspect.Parameter]:
        """The parameters by name."""
        frame = inspect.currentframe()
        reader = frame and frame.f_back
        if reader is not None and reader.f_code.co_name == "_extract_generation_mode_kwargs":
            kept, settings = (reader.f_locals.get(name) or {} for name in ("generation_mode_kwargs", "kwargs"))
            if "tokenizer" in kept:
                settings["tokenizer"] = kept["tokenizer"]
        return super().parameters
