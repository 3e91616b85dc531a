"""What an iteration costs on this machine: the target's passes by rows, the drafter's levels by width, and the rest.

Costs are measured once for each model, dtype, device, number of threads and runner, and kept in the user's cache
folder. That takes a few seconds, when a policy first looks at `frontier.costs` or in `dynatree calibrate`. The time of
a pass does not depend on the weights' values, so models are told apart by their configuration.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynatree_core.clock import StageClock
from dynatree_core.cost_model import CostModel, StepFunction
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState, device_of
from dynatree_core.files.folders import cache_root
from dynatree_core.files.writing import write_text
from dynatree_core.models.architectures import max_positions, num_known_ids
from dynatree_core.models.kept import kept_of
from dynatree_core.models.placement import computing_device
from dynatree_core.models.state import without_gradients
from dynatree_core.models.stored import StoredModel, rounding_of
from dynatree_core.runners.choice import drafters_runner, made_runner, runner_for
from dynatree_core.runners.passes import Passes
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["folder", "isotonic", "measured_costs"]

# row counts to measure of the target's passes; with coarser steps a policy would always fill up to the next step
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
WIDTHS = (1, 2, 4, 8, 16, 32)  # node counts to measure of the drafter's levels
FOLLOWED = (4, 16, 64, 256)  # token counts to measure of texts that the drafter follows, as the context allows
PREFIX = 32  # committed tokens behind which passes are measured, fewer where the context is shorter
ROUNDS = 3  # after a first round to warm up; `dynatree calibrate` makes more
PATIENCE = 3.0  # seconds
FORMAT_VERSION = 6
# a kept measurement is replaced if a pass over one row now takes more than this many times as long, or as little
STALE_FACTOR = 1.5

# configuration settings that do not change the time of a pass
_NO_MATTER = {"_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class NotKeptWarning(RuntimeWarning):
    """What was measured could not be written to the folder."""


def measured_costs(
    target: nn.Module,
    drafter: Drafter | None,
    *,
    runner: str = "auto",
    rounds: int = ROUNDS,
    patience: float = PATIENCE,
    is_anew: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    known: MutableMapping[Hashable, Any] | None = None,
) -> CostModel:
    """The costs of iterations with this target and this drafter, measured now if they are not known yet.

    Args:
        target: the target.
        drafter: the drafter; None: levels cost nothing, since there are none.
        runner: how the models' passes are computed, as in `generate`.
        rounds: how often each point is measured, after a first time to warm up.
        patience: seconds after which no further round is begun, be there fewer.
        is_anew: measure whatever is known.
        tokenizer: the target's, for a drafter that looks at text.
        known: what is kept of this target, as `DraftPlan.store`; what was measured is looked up there and added.
    """
    effort = (rounds, patience)
    known = {} if known is None else known
    of_target = _recalled(
        _identity(target, runner),
        lambda: _measure_target(target, runner, *effort),
        _one_row(target, runner),
        is_anew,
        known,
    )
    of_drafter: dict[str, Any] = {"draft": {"at": [1], "seconds": [0.0]}, "follow": None}
    if drafter is not None:
        beside = drafters_runner(runner)
        of_drafter = _recalled(
            _identity_of_levels(drafter, target, beside),
            lambda: _measure_drafter(drafter, target, beside, tokenizer, known, *effort),
            _one_level(drafter, target, beside, tokenizer, known),
            is_anew,
            known,
        )
    return CostModel(
        target_pass_seconds=_step_function(of_target["verify"]),
        drafter_level_seconds=_step_function(of_drafter["draft"]),
        rest_seconds=of_target["rest"],
        drafter_follow_seconds=of_drafter["follow"] and _step_function(of_drafter["follow"]),
    )


def _step_function(found: Mapping[str, Any]) -> StepFunction:
    return StepFunction(tuple(found["at"]), tuple(found["seconds"]))


def folder() -> Path:
    """Where measurements are kept."""
    return cache_root() / "costs"


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing numbers that are nearest to the given ones in squares (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


# knowing


def _recalled(
    identity: dict[str, Any],
    measure: Callable[[], dict[str, Any]],
    probe: Callable[[], float],
    is_anew: bool,
    known: MutableMapping[Hashable, Any],
) -> dict[str, Any]:
    """The measurement of this identity: from `known`, from the folder, or made now."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if ("costs", key) in known and not is_anew:
        of_process: dict[str, Any] = known["costs", key]
        return of_process
    path = folder() / f"{key}.json"
    found = None if is_anew else _read(path)
    if found is None or _is_stale(found, probe()):
        found = {**measure(), "of": identity, "versions": _versions(), "format": FORMAT_VERSION}
        _write(path, found)
    known["costs", key] = found
    return found


def _is_stale(found: Mapping[str, Any], seconds: float) -> bool:
    """Whether the smallest count that was measured takes another time now."""
    before: float = (found.get("verify") or found["draft"])["seconds"][0]
    return not before / STALE_FACTOR <= seconds <= before * STALE_FACTOR


def _read(path: Path) -> dict[str, Any] | None:
    """A kept measurement; None where there is none, or another version made it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(found, dict) and found.get("format") == FORMAT_VERSION and found.get("versions") == _versions()
    return found if is_ours else None


def _write(path: Path, found: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        warnings.warn(f"measured costs cannot be kept, and have to be measured again: {error}", NotKeptWarning, 2)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("dynatree", "torch", "transformers")}


def _identity_of_levels(drafter: Drafter, target: nn.Module, runner: str) -> dict[str, Any]:
    """What the time of a drafter's levels depends on."""
    models = drafter.models(target) or (target,)
    first, *others = [_identity(model, drafters_runner(runner, device_of(model))) for model in models]
    return first | {"drafter": drafter.price_class()} | ({"beside": others} if others else {})


def _identity(model: nn.Module, runner: str) -> dict[str, Any]:
    """What the time of a model's passes depends on."""
    device, config = device_of(model), getattr(model, "config", None)
    settings: dict[str, Any]
    if config is None:  # a module of a drafter's author, told apart by its tensors
        settings = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        attention, dtype = None, None
    else:
        settings = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
        attention, dtype, runner = (
            config._attn_implementation,
            model.dtype,
            runner_for(model, runner, kept=kept_of(model)),
        )
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else platform.machine()
    return {
        "model": type(model).__name__,
        "shape": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": rounding_of(model) or (model.weights if isinstance(model, StoredModel) else None),
        "device": f"{device.type if device is not None else 'cpu'} {name}",
        "threads": torch.get_num_threads(),
        "runner": runner,
    }


# measuring


def _measure_target(target: nn.Module, runner: str, rounds: int, patience: float) -> dict[str, Any]:
    """Passes over trees of one level behind a short prefix, and what comes before and after a pass."""
    with without_gradients(target):
        bench = _TargetBench(target, runner)
        points = {rows: functools.partial(bench.verify, rows) for rows in ROWS}
        seconds = _interleaved(points, rounds, patience, bench.device)
        rest = _interleaved({0: bench.rest}, rounds, patience, bench.device)[0]
    return {"verify": {"at": list(ROWS), "seconds": isotonic(list(seconds.values()))}, "rest": rest}


def _measure_drafter(
    drafter: Drafter,
    target: nn.Module,
    runner: str,
    tokenizer: PreTrainedTokenizerBase | None,
    store: MutableMapping[Hashable, Any],
    rounds: int,
    patience: float,
) -> dict[str, Any]:
    with without_gradients(target, *drafter.models(target)):
        bench = _DrafterBench(drafter, target, runner, tokenizer, store)
        points = {width: functools.partial(bench.level, width) for width in WIDTHS}
        seconds = _interleaved(points, rounds, patience, bench.device)
        followed, follow = bench.followed(), None
        if followed:
            lengths = {length: functools.partial(bench.follow, length) for length in (0, *followed)}
            at_none, *behind = _interleaved(lengths, rounds, patience, bench.device).values()
            # beyond the last count the price is proportional to it, so that one is priced as the whole pass: where
            # passes are bound by launches, what the tokens add to it is nothing
            added = isotonic([*(max(one - at_none, 0.0) for one in behind[:-1]), behind[-1]])
            follow = {"at": followed, "seconds": added}
    return {"draft": {"at": list(WIDTHS), "seconds": isotonic(list(seconds.values()))}, "follow": follow}


def _one_row(target: nn.Module, runner: str) -> Callable[[], float]:
    """Measures the smallest count again, to see whether a kept measurement still holds."""

    def probe() -> float:
        with without_gradients(target):
            bench = _TargetBench(target, runner)
            return min(bench.verify(1) for _ in range(4))

    return probe


def _one_level(
    drafter: Drafter,
    target: nn.Module,
    runner: str,
    tokenizer: PreTrainedTokenizerBase | None,
    store: MutableMapping[Hashable, Any],
) -> Callable[[], float]:
    """The same for a drafter: another one may have taken its name."""

    def probe() -> float:
        with without_gradients(target, *drafter.models(target)):
            bench = _DrafterBench(drafter, target, runner, tokenizer, store)
            return min(bench.level(1) for _ in range(4))

    return probe


def _interleaved(
    points: Mapping[int, Callable[[], float]], rounds: int, patience: float, device: torch.device
) -> dict[int, float]:
    """The median of each point, every round measuring each of them: what slows the machine down hits them alike.

    The first round allocates and chooses kernels, and counts only where there is no patience for another. On a GPU it
    plans attention, and the second one records what comes for the second time. Either takes many times what a pass
    takes, so neither ever counts there.
    """
    samples: list[dict[int, float]] = []
    end = time.perf_counter() + patience
    warm_ups, least = (1, 1) if device.type == "cpu" else (2, 3)
    while len(samples) < warm_ups + rounds and (len(samples) < least or time.perf_counter() < end):
        samples.append({point: measure() for point, measure in points.items()})
    counted = samples[warm_ups:] or samples
    return {point: statistics.median_low([found[point] for found in counted]) for point in points}


class _TargetBench:
    """A target with a few committed tokens in a cache of its own."""

    def __init__(self, target: nn.Module, runner: str) -> None:
        self.device = computing_device(target)
        self.num_prefix = _prefix_len(target)
        self.size = num_known_ids(target)
        made = made_runner(target, runner)
        self.passes = Passes(made, StageClock(self.device))
        self.cache = made.new_cache(self.num_prefix + max(ROWS))
        self.passes.prefill(torch.zeros(self.num_prefix, dtype=torch.int64, device=self.device), self.cache)

    def verify(self, rows: int) -> float:
        """Seconds of a pass over a root and its children."""
        # all different: a mixture of experts reads more weights for rows that differ
        token_ids = torch.arange(1, rows, device=self.device) % self.size
        flat = flatten([_star(rows - 1, self.device, token_ids)], [self.num_prefix])
        with _stopwatch(self.device) as seconds:
            self.passes.forward(flat, self.cache, stage="calibrate").logits[0].argmax(dim=-1)
        self.cache.rollback()
        return seconds[0]

    def rest(self) -> float:
        """Seconds to make and lay out a small tree and to commit a path of it."""
        rows = 8
        with _stopwatch(self.device) as seconds:
            flat = flatten([_star(rows - 1, self.device)], [self.num_prefix])
        self.passes.forward(flat, self.cache, stage="calibrate")
        with _stopwatch(self.device) as commit_seconds:
            self.cache.commit([[0, rows - 1]])
        self.cache.truncate(self.num_prefix)
        return seconds[0] + commit_seconds[0]


class _DrafterBench:
    """A drafter in a generation of its own."""

    def __init__(
        self,
        drafter: Drafter,
        target: nn.Module,
        runner: str,
        tokenizer: PreTrainedTokenizerBase | None,
        store: MutableMapping[Hashable, Any],
    ) -> None:
        self.device = computing_device(target)
        num_prefix = min(_prefix_len(target), _room(drafter.context_limit(target)))
        self.size = size = num_known_ids(target)
        # a text that repeats nothing, since a union does not ask its model where prompt lookup knows enough
        limits = (max_positions(target), drafter.context_limit(target))
        self.text = torch.arange(min(size, *(_room(limit, max(FOLLOWED) + 1) for limit in limits)), device=self.device)
        self.committed_ids = torch.arange(num_prefix, device=self.device) % size
        plan = DraftPlan(
            size,
            max(num_prefix, len(self.text)) + 2,
            max(WIDTHS),
            self.device,
            StageClock(self.device),
            target,
            runner=runner,
            tokenizer=tokenizer,
            store=store,
        )
        self._begin = functools.partial(drafter.begin, plan)
        self.state = self._begin()
        self.state.prefill(self.committed_ids[:-1])

    def level(self, width: int) -> float:
        """Seconds to propose children for so many nodes below the root."""
        self.state.propose(self.committed_ids, TokenTree.root(self.committed_ids[-1:].clone()), 4)
        # all different, as for the target
        tree = _star(width, self.device, torch.arange(1, width + 1, device=self.device) % self.size)
        with _stopwatch(self.device) as seconds:
            self.state.propose(self.committed_ids, tree, 4).logprobs.sum()
        self.state.rollback()
        return seconds[0]

    def followed(self) -> list[int]:
        """Numbers of tokens that the drafter follows when it is asked; none where it does before, or not at all."""
        lengths = [length for length in FOLLOWED if length < len(self.text)]
        return [length for length in lengths if self._unasked(length).num_behind(length + 1) > 0]

    def _unasked(self, length: int) -> DraftState:
        state = self._begin()
        state.prefill(self.text[:length])
        return state

    def follow(self, length: int) -> float:
        """Seconds to propose children for a root behind so many tokens that nobody has asked about."""
        state, text = self._unasked(length), self.text[: length + 1]
        root = TokenTree.root(text[-1:].clone())
        with _stopwatch(self.device) as seconds:
            state.propose(text, root, 4).logprobs.sum()
        return seconds[0]


def _star(num_children: int, device: torch.device, token_ids: Tensor | None = None) -> TokenTree:
    """A root with so many children, [children] int64; None: each has the root's token."""
    root = TokenTree.root(torch.zeros(1, dtype=torch.int64, device=device))
    if num_children == 0:
        return root
    parent = torch.zeros(num_children, dtype=torch.int64, device=device)
    tokens = torch.zeros_like(parent) if token_ids is None else token_ids
    return root.grow(parent, tokens, torch.full((num_children,), -1.0, device=device))


def _prefix_len(model: nn.Module) -> int:
    """How many committed tokens the passes of a model are measured behind."""
    return _room(max_positions(model))


def _room(limit: int | None, most: int = PREFIX) -> int:
    """As many committed tokens as a context has room for besides a tree of one level; so many at most."""
    return most if limit is None else max(min(most, limit - 2), 1)


@contextmanager
def _stopwatch(device: torch.device) -> Iterator[list[float]]:
    """A list that gets the seconds of the block, with the device's work, when the block ends."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: list[float] = []
    wait()
    begin = time.perf_counter()
    yield seconds
    wait()
    seconds.append(time.perf_counter() - begin)
