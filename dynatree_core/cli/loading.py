"""Models and drafters by the names of a command line: which one is meant, and loading it.

torch and transformers take seconds to import, so they are imported when a model is loaded.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynatree_core.cli import console
from dynatree_core.cli.imports import importing
from dynatree_core.errors import ModelLoadError, UnknownPluginError, VocabularyMismatchError, nearest_match
from dynatree_core.files.folders import expanded
from dynatree_core.plugins.registry import DRAFTERS, plugin_table
from dynatree_core.plugins.spec import canonical_name, parse_stack
from dynatree_core.request.defaults import DEFAULT_POLICY

if TYPE_CHECKING:
    from dynatree_core.drafters.base import Drafter
    from dynatree_core.models.load import LoadedModel

__all__ = [
    "USUAL_DRAFTERS",
    "USUAL_POLICIES",
    "check_drafter_model",
    "check_drafter_name",
    "is_packed",
    "load",
    "load_drafter",
    "load_target",
    "registered_drafter",
    "usual_drafter",
    "usual_policy",
]


def load(
    name: str | None, device: str | None, dtype: str, weights: str | None = None, activations: Any = "full"
) -> LoadedModel:
    """Load a model; a terminal shows what is being waited for. The arguments are those of `load_model`."""
    with importing():
        from dynatree_core.models.load import DEFAULT_MODEL, load_model

    _quiet_libraries()
    is_here = name is None or name == DEFAULT_MODEL or expanded(name).exists()
    with console.spinner(f"loading {name or 'the default model'}", is_animated=is_here) as progress:
        return load_model(name, device=device, dtype=dtype, weights=weights, activations=activations, progress=progress)


def load_target(
    name: str | None, device: str | None, dtype: str, /, *, weights: str, activations: str, **settings: Any
) -> LoadedModel:
    """Load a command's target by its options, of which `runner` and `cache` count among `settings`."""
    asked = _loadable_weights(weights, activations=activations, **settings)
    return load(name, device, dtype, asked, activations)


def _loadable_weights(
    weights: str, *, runner: str = "auto", cache: str | None = None, activations: str = "full", **others: Any
) -> str | None:
    """What `load` is asked for, for what a command was asked for.

    Only the native runner computes weights as they were published. For others, and with a bounded cache, which asks
    transformers' modules for their angles, the same numbers are loaded in 32 bits. Rounded activations have no such
    form, so that these are refused once the model is loaded.
    """
    is_native = (runner in ("auto", "native") and cache is None) or activations != "full"
    return weights if is_native or weights != "stored" else None


def is_packed(weights: str, **settings: Any) -> bool:
    """Whether `load_target` will look for the embedded model as it was published, as far as it shows without torch."""
    return _loadable_weights(weights, **settings) not in (None, "fp32")


def _quiet_libraries() -> None:
    """No notices of several lines between ours: what matters comes as an error. Bars on a terminal only."""
    from transformers.utils import logging as transformers_logging

    for name in ("huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # those of the hub as well


USUAL_DRAFTERS = "distilled+prompt_lookup for the embedded model, else prompt_lookup"  # as a help text says it


def usual_drafter(target: str | None) -> str:
    """The drafter where none is asked for: the embedded model has a student of its own (docs/results/drafter.md)."""
    return "distilled+prompt_lookup" if target in (None, "default") else "prompt_lookup"


def check_drafter_name(text: str) -> None:
    """Refuse names of drafters that nothing installed has; nothing is imported.

    A word that is nearly a drafter's name is refused too: nobody has a model of that name.

    Raises:
        StackSyntaxError, UnknownPluginError.
    """
    known = plugin_table(DRAFTERS)
    if _first_name(text) in known:
        unknown = next((spec.name for spec in parse_stack(text) if spec.name not in known), None)
    else:
        is_near = nearest_match(_first_name(text), known) and "/" not in text and not Path(text).exists()
        unknown = text if is_near else None
    if unknown is not None:
        raise UnknownPluginError(
            f"'{unknown}' is not an installed drafter{nearest_match(unknown, known)}; known are: {', '.join(known)}; "
            "a model on the hub is written owner/name, a folder ./name"
        )


def _first_name(text: str) -> str:
    return canonical_name(re.split("[:(+]", text, maxsplit=1)[0].strip())


def registered_drafter(text: str) -> Drafter | None:
    """The registered drafter or the student's folder that is meant, or None for a model's id or folder."""
    check_drafter_name(text)
    from dynatree_core.drafters.build import build_drafter
    from dynatree_core.drafters.distilled import DistilledDrafter
    from dynatree_core.models.student import is_student

    if _first_name(text) in plugin_table(DRAFTERS):
        return build_drafter(text)
    return DistilledDrafter(text) if is_student(expanded(text)) else None


def check_drafter_model(name: str) -> None:
    """Refuse a model as drafter that cannot be loaded: a folder without one, or an id without a hub."""
    from dynatree_core.models.load import check_model_name

    with _naming_drafters(name):
        check_model_name(name)


@contextmanager
def _naming_drafters(name: str) -> Iterator[None]:
    """A word that is no model may have been meant for a drafter."""
    try:
        yield
    except ModelLoadError as error:
        if "/" in name:
            raise
        known = ", ".join(plugin_table(DRAFTERS))
        raise ModelLoadError(f"{error}; or name an installed drafter: {known}") from error


def load_drafter(name: str, target: LoadedModel) -> LoadedModel:
    """A model as drafter, on the target's device and in its dtype.

    Raises:
        VocabularyMismatchError: its tokenizer gives tokens other ids than the target's.
    """
    from dynatree_core.models.load import vocabularies_match

    with _naming_drafters(name):
        device, dtype = str(target.model.device), str(target.model.dtype).removeprefix("torch.")
        drafter = load(name, device, dtype, getattr(target.model, "weights", None))
    if vocabularies_match(target.tokenizer, drafter.tokenizer) is False:
        raise VocabularyMismatchError(
            f"target and drafter must give every token the same id, but the tokenizers of '{target.name}' and "
            f"'{drafter.name}' do not; choose a drafter of the target's family, or prompt_lookup"
        )
    return drafter


USUAL_POLICIES = f"cost_aware for the embedded model, else {DEFAULT_POLICY}"  # as a help text says it


def usual_policy(target: str | None) -> str:
    """The stack where none is asked for: the embedded model's passes are so quick that it depends on their prices
    whether trees pay (docs/results/cpu-peers.md)."""
    return "cost_aware" if target in (None, "default") else DEFAULT_POLICY
