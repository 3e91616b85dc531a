"""Which runner computes a model's passes: the one that is named, or what "auto" takes among the installed ones."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn

from dynatree_core import ops
from dynatree_core.errors import DynaTreeError, ParameterError, PluginLoadError
from dynatree_core.models.kept import kept_of
from dynatree_core.models.placement import reason_to_call
from dynatree_core.models.stored import StoredModel
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.registry import RUNNERS, check_runner_name, load_plugin, plugin_table
from dynatree_core.plugins.spec import canonical_name
from dynatree_core.runners.base import Kept, Runner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import is_out_of_memory

__all__ = ["drafters_runner", "load_runner", "made_runner", "make_runner", "runner_for"]

NATIVE = "native"  # the runner of a `StoredModel`
PACKED = "packed"  # what serves a CPU where that cannot
READING = (NATIVE, PACKED, "cudagraph")  # those that read or record where weights are


def make_runner(model: nn.Module, name: str, *, kept: Kept | None = None) -> Runner:
    """The runner of a model for a generation that begins.

    Args:
        model: the model; it is not changed.
        name: of an installed runner, or "auto".
        kept: what earlier generations with this model have left, and where this one leaves what is dear to make, such
            as packed copies; None: nothing is remembered.

    Raises:
        UnknownPluginError: there is no such runner.
        ParameterError: it cannot run this model here.
        PluginLoadError: its package is broken.
    """
    kept = {} if kept is None else kept
    chosen = runner_for(model, name, kept=kept)
    if isinstance(model, StoredModel) and chosen != NATIVE:
        model, kept = in_transformers(model)
    if name != "auto" and chosen != canonical_name(name):
        reason = load_runner(canonical_name(name)).reason_for_eager(model)
        warnings.warn(f"{reason}; use runner='eager' for this model", RuntimeWarning, stacklevel=3)
    try:
        with _named(chosen):
            return load_runner(chosen).make(model, kept)
    except ParameterError as error:
        if name != "auto":
            raise
        warnings.warn(f"passes are slower than they could be: {error}", RuntimeWarning, stacklevel=3)
        return EagerRunner(model)


def made_runner(model: nn.Module, name: str) -> Runner:
    """The runner of a model with what earlier generations with it have left; see `make_runner`."""
    return make_runner(model, name, kept=kept_of(model))


def runner_for(model: nn.Module, name: str, *, kept: Kept | None = None, any_cache: bool = False) -> str:
    """The name of the runner that `make_runner` is to make; the arguments are the same.

    With `any_cache`, "auto" leaves out runners that do not take every cache.

    "auto" is the one with the greatest preference among those that can run the model. A package that is broken is left
    out, with a warning. Where a runner is named that is not worth its while for this model, it is "eager".
    """
    check_runner_name(name)
    name = canonical_name(name)
    if isinstance(model, StoredModel):
        if name in ("auto", NATIVE) and not any_cache:  # before others' classes are imported, which takes seconds
            with _named(NATIVE):
                reason = load_runner(NATIVE).reason_against(model)
            if reason is None:
                return NATIVE
        model, kept = in_transformers(model)
    if name != "auto":
        kind = load_runner(name)
        with _named(name):
            reason, is_eager_better = kind.reason_against(model), kind.reason_for_eager(model) is not None
        to_call = reason_to_call(model) if name in READING else None
        if to_call is not None:
            reason = f"reads a model's weights, but {to_call}"
        if reason is not None:
            raise ParameterError(f"the {name} runner {reason}; use runner='auto'")
        return EagerRunner.name if is_eager_better else name
    preferences = {}
    for known in plugin_table(RUNNERS):
        try:
            if not any_cache or load_runner(known).takes_any_cache:
                preferences[known] = _preference(known, model, {} if kept is None else kept)
        except DynaTreeError as error:
            warnings.warn(f"runner='auto' leaves out '{known}': {error}", RuntimeWarning, stacklevel=3)
    chosen = max(preferences, key=lambda known: preferences[known], default=EagerRunner.name)
    if chosen == PACKED and model.dtype == torch.float32 and not any_cache:
        _tell_of_missing_library(ops.reason_missing())
    return chosen


@functools.cache  # once in a process
def _tell_of_missing_library(reason: str | None) -> None:
    if reason is not None:
        warnings.warn(
            f"the native runner, which is faster, cannot be used and packed serves: its library is missing; {reason}",
            RuntimeWarning,
            stacklevel=5,
        )


def in_transformers(model: StoredModel) -> tuple[nn.Module, Kept]:
    """The model with transformers' modules, for runners that need these, and what is kept of it."""
    plain = model.in_transformers()
    return plain, kept_of(plain)


def drafters_runner(name: str, device: torch.device | None = None) -> str:
    """The runner for the drafter's model beside a target with this one.

    Args:
        name: the target's runner. What is neither `eager` nor `cudagraph` becomes `auto`, since it may not support the
            drafter's model.
        device: the drafter's device, if it is not the target's. `cudagraph` becomes `auto` where that is no GPU.
    """
    is_without_gpu = device is not None and device.type != "cuda"
    return "auto" if name not in ("eager", "cudagraph") or (name == "cudagraph" and is_without_gpu) else name


def load_runner(name: str) -> type[Runner]:
    """The class behind a name, which is not "auto".

    Raises:
        UnknownPluginError, PluginConflictError, PluginLoadError: as `load_plugin`.
    """
    kind = load_plugin(RUNNERS, name)
    if not (isinstance(kind, type) and issubclass(kind, Runner) and getattr(kind, "name", None) == name):
        raise PluginLoadError(
            f"'{name}' of {RUNNERS} must be a class derived from Runner with name = '{name}', got {kind!r}; repair the "
            "entry point or uninstall it"
        )
    return kind


def _preference(name: str, model: nn.Module, kept: Kept) -> int:
    kind = load_runner(name)
    with _named(name):
        return kind.preference(model, kept) if kind.reason_against(model) is None else 0


def _named(name: str) -> AbstractContextManager[None]:
    """Turn whatever a runner's class raises into an error that names it, but for memory that is not there."""

    def blame(error: BaseException) -> BaseException:
        if isinstance(error, Exception) and is_out_of_memory(error):
            return error
        return PluginLoadError(
            f"the {name} runner must say whether it can run a model and be made for one that it can, but raised "
            f"{raised(error)}; repair or uninstall its package"
        )

    return others_code(blame, DynaTreeError)
