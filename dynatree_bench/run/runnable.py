"""Which methods can run on a pair. The others are left out before anything runs, and it is said why."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from dynatree_bench.run.experiments import Method
from dynatree_bench.run.pairs import Pair
from dynatree_core.cache.sink_cache import SinkCache, SinkWindow
from dynatree_core.errors import InputError, ParameterError, UnsupportedModelError


def runnable(methods: Iterable[Method], pair: Pair, *, only: Iterable[str] = ()) -> tuple[list[Method], list[str]]:
    """The methods that can run, and a note for each reason why others cannot.

    Args:
        methods: what an experiment asks for.
        pair: the models.
        only: names of methods that were asked for one by one.

    Raises:
        InputError: one that was asked for by its name cannot run.
    """
    left_out: dict[str, list[str]] = {}
    found, asked = [], set(only)
    for method in methods:
        reason = reason_against(method, pair)
        if reason is None:
            found.append(method)
        elif method.name.removesuffix(f" with {method.drafter}") in asked:
            raise InputError(f"'{method.name}' cannot run here: {reason}")
        else:
            left_out.setdefault(reason, []).append(method.name)
    return found, [f"left out: {', '.join(names)}: {reason}" for reason, names in left_out.items()]


def reason_against(method: Method, pair: Pair) -> str | None:
    """Why a method cannot run on a pair, as far as that is known beforehand; None if nothing is."""
    pair = pair.drafting_with(method.drafter)
    if "assistant" in method.options and pair.drafter_model is None:
        return f"the drafter must be a plain transformers model (--drafter ID|PATH), got {pair.drafter}"
    if method.kind == "rival" and find_spec(method.name) is None:
        return "not installed; run pip install 'dynatree[rivals]'"
    if method.kind == "dynatree" and "cache" in method.options:
        option = SinkWindow.parse(method.options["cache"])
        assert option is not None, "the method names a cache"
        try:
            SinkCache(pair.target.model, option, max_nodes=1)  # takes no memory before its first rows
        except (UnsupportedModelError, ParameterError) as error:
            return str(error)
    return None
