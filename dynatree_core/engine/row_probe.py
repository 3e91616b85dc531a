"""Whether the rows of a pass are independent of each other, asked of models that are not as transformers made them.

Trees are exact because a row of a pass says the same whatever stands in the other rows, wherever it stands and however
many there are. The families of `EXACT_FAMILIES` are shown to be so. Somebody's own code on one of them may break it:
activations that are quantised by one scale for all rows, observers that go on counting, hooks that look at the last row
or at the number of rows, adapters that count tokens from the end. It would change the text without an error.

So such a model is asked once, by some 40 passes over random tokens. All but one have at most two dozen rows:

- the same tree first and last, and with other tokens in the rows that a row may not see: bit for bit the same logits
  (the latter up to rounding in a mixture of experts, since an expert's product has the rows that have chosen it);
- trees, one as large as they get, against passes of one row, and these against passes in the order of transformers' own
  generate (the whole prompt at once, then one row each): the same logits up to rounding. What rounding does to this
  model is measured by passes of one row whose cached keys and values are moved by a few units in the last place.

Activations that are rounded to few steps as they come amplify rounding ten thousandfold: an entry on the border of two
steps goes to the one or the other. Then passes of two shapes choose different tokens on ordinary text, though rows are
independent. Such a model is refused too, but for passes that all have one shape (`exact="fixed_width"`).
"""

from __future__ import annotations

import itertools
import random
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import ForwardPassError, UnsupportedModelError
from dynatree_core.models.architectures import cache_argument, has_experts, max_positions, num_known_ids
from dynatree_core.models.comparable import comparable, noting_what_keeps
from dynatree_core.models.placement import computing_device
from dynatree_core.models.state import foreign_parts, hooks_of, state_of, without_gradients
from dynatree_core.request.arguments import DEFAULT_MAX_NODES
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["RowFault", "refuse_dependent_rows", "row_fault"]

PREFIX = 20  # committed tokens, fewer where the context is shorter
NUM_NODES = 6  # of the tree
WIDE_ROWS = 1 + DEFAULT_MAX_NODES  # as many as a tree has at most, unless the caller allows more
NUM_OTHERS = 3  # trees with other tokens in the hidden rows
NUM_NOISES = 4  # trials that measure what rounding does
NOISE_UNITS = 64  # how far these move keys and values, in units of the last place
STEP_UNITS = 4096  # likewise, for entries to cross the borders of steps in a small model too
NOISE_MARGIN = 8  # a deviation so many times as large as that of the noise is not rounding
# what noise of STEP_UNITS moves logits by, over the noise: 1 in the default model, up to 16 in small random ones and up
# to 19 with adapters in bfloat16; 110 to 350 with int8 activations
MAX_AMPLIFICATION = 48
ROUNDING_UNITS = 64  # of the largest logit, that passes of other shapes may differ by in any model
MAX_STATES = 16  # of one model that are remembered
MAX_NAMED = 3  # parts in a message


@attrs.frozen
class RowFault:
    """Why trees are not exact on a model."""

    what: str  # a sentence
    is_rounding: bool = False  # no fault where all passes have one shape, since these round alike


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, RowFault | None]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # a hook of the model that is tried may run another one


def refuse_dependent_rows(model: nn.Module, caller: nn.Module, *, is_fixed_width: bool = False) -> None:
    """Refuse a target whose rows are not independent of each other, or whose rounding chooses tokens.

    Args:
        model: the model that is given passes over trees.
        caller: what its user calls: the model itself, or a wrapper around it.
        is_fixed_width: whether all passes of a generation have one shape.

    Raises:
        UnsupportedModelError: naming what was found, and the parts that transformers has not made.
    """
    fault = row_fault(model, caller)
    if fault is None or (fault.is_rounding and is_fixed_width):
        return
    named = list(itertools.islice(foreign_parts(caller), MAX_NAMED))
    remedy = (
        "Quantise its weights alone, or use exact='fixed_width'" if fault.is_rounding else "Take that off the model"
    )
    raise UnsupportedModelError(
        f"the target ({type(caller).__name__}) cannot be decoded with trees: {fault.what}. Its {'; '.join(named)}. "
        f"{remedy}; trust_model=True decodes it all the same"
    )


def row_fault(model: nn.Module, caller: nn.Module | None = None) -> RowFault | None:
    """What is wrong with the rows of a model's passes; None: nothing was found.

    A model that is as transformers made it is not asked. Any other is asked once for each state it is in
    (`dynatree_core.models.state`).
    """
    caller = model if caller is None else caller
    if next(foreign_parts(caller), None) is None:
        return None
    with _lock:
        known = _known.setdefault(model, {})
        state = comparable(caller), state_of(model, reads_code=True)
        if state in known:
            return known[state]
        # random layers of somebody's own must not move the generators that sampling draws from
        device = computing_device(model)
        unmoved = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with unmoved, without_gradients(model, caller), noting_what_keeps(model, hooks_of(model)):
            fault = _asked(model, caller)
        while len(known) >= MAX_STATES:
            del known[next(iter(known))]
        known[comparable(caller), state_of(model, reads_code=True)] = fault
        return fault


def _asked(model: nn.Module, caller: nn.Module) -> RowFault | None:
    probe = _Probe.of(model)
    try:
        tree = probe.tree_logits(probe.tree(0))
        others = [probe.tree_logits(probe.tree(1 + other)) for other in range(NUM_OTHERS)]
        stepwise = probe.stepwise_logits()
        usual = probe.usual_logits(caller)
        noise = max(_off(stepwise, probe.stepwise_logits(noise=1 + seed)) for seed in range(NUM_NOISES))
        is_single = model.dtype == torch.float32  # float64 hardly rounds, half precision chooses tokens anyway
        steps = [_off(stepwise, probe.stepwise_logits(1 + seed, STEP_UNITS)) for seed in range(NUM_NOISES * is_single)]
        wide = probe.tree_logits(probe.wide_tree())
        again = probe.tree_logits(probe.tree(0))  # at the end: what counts calls or has seen a token shows by then
    except ForwardPassError as error:
        return RowFault(f"a trial of a few passes failed: {error}")
    if stepwise.isnan().any():
        return None  # the generation says so itself
    unit = probe.unit * float(stepwise.abs().amax())
    bound = max(NOISE_MARGIN * noise, ROUNDING_UNITS * unit)
    if not _off(tree, again) <= unit:
        return RowFault(f"a pass that is repeated gives other numbers (logits move by {_off(tree, again):.2g})")
    moved = max(_off(tree, other) for other in others)
    if not moved <= (bound if has_experts(model) else unit):
        return RowFault(
            "its rows depend on each other: what a row says changes with the tokens of rows that it may not see "
            f"(logits move by {moved:.2g})"
        )
    pairs = {
        "rows of a tree and passes of one row": tree,
        f"rows of a pass of {WIDE_ROWS} rows and passes of one row": wide,
        "passes of one row and transformers' own passes": usual,
    }
    for name, logits in pairs.items():
        if not (deviation := _off(stepwise, logits)) <= bound:
            return RowFault(
                f"its rows depend on their place in a pass or on how many there are: {name} differ by {deviation:.2g}, "
                f"where rounding explains {bound:.2g}"
            )
    amplification = max(steps, default=0.0) / (STEP_UNITS * unit)
    if amplification > MAX_AMPLIFICATION:
        return RowFault(
            "it amplifies rounding, as activations do that are quantised as they come: a unit in the last place of its "
            f"keys and values moves logits by {amplification:.0f} units, so passes of other shapes choose other tokens "
            "than generate() does",
            is_rounding=True,
        )
    return None


def _off(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN where one of them has any."""
    return float((a.double() - b.double()).abs().amax())


@attrs.frozen(eq=False)
class _Probe:
    """The texts that a model is asked about, and the passes over them. Logits are [2, vocab]: root and one child."""

    model: nn.Module
    prefix: Tensor  # [tokens] int64
    root: int
    child: int
    hidden: Sequence[Sequence[int]]  # tokens of the nodes that root and child do not see, one choice a tree

    @classmethod
    def of(cls, model: nn.Module) -> _Probe:
        limit = max_positions(model)
        num_prefix = PREFIX if limit is None else max(1, min(PREFIX, limit - 4))
        draw = random.Random(0)
        size = num_known_ids(model)
        text = [draw.randrange(size) for _ in range(num_prefix + 2)]
        hidden = [[draw.randrange(size) for _ in range(NUM_NODES - 2)] for _ in range(1 + NUM_OTHERS)]
        device = computing_device(model)
        return cls(model, torch.tensor(text[:-2], device=device), text[-2], text[-1], hidden)

    @property
    def unit(self) -> float:
        """The unit in the last place of 1, in the coarsest precision that the model computes in."""
        device = computing_device(self.model)
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # eager softmax is float32 in any model

    def tree(self, choice: int) -> TokenTree:
        """The root, its child between two others, and a child of each of these."""
        before, behind, below, last = self.hidden[choice]
        tree = self._level(TokenTree.root(self._one(self.root)), [0, 0, 0], [before, self.child, behind])
        return self._level(tree, [1, 3], [below, last])

    def wide_tree(self) -> TokenTree:
        """The root and so many children that a pass has as many rows as any."""
        draw = random.Random(1)
        tree = TokenTree.root(self._one(self.root))
        children = [draw.randrange(num_known_ids(self.model)) for _ in range(WIDE_ROWS - 1)]
        children[1] = self.child
        return self._level(tree, [0] * len(children), children)

    def tree_logits(self, tree: TokenTree) -> Tensor:
        passes, cache = self._prefilled()
        flat = flatten([tree], [cache.next_place])
        return passes.forward(flat, cache, stage="probe").logits[0, [0, 2]]

    def stepwise_logits(self, noise: int | None = None, units: int = NOISE_UNITS) -> Tensor:
        """By passes of one row each; with noise by a seed, behind keys and values that are so many units off."""
        passes, cache = self._prefilled()
        if noise is not None:
            generator = torch.Generator().manual_seed(noise)
            for buffer in (*cache.keys, *cache.values):
                rows = buffer[:, :, : cache.length]
                sign = torch.randint(0, 2, rows.shape, generator=generator).to(rows.device) * 2 - 1
                rows *= 1 + sign * (units * self.unit)
        rows_of = []
        for token_id in (self.root, self.child):
            flat = flatten([TokenTree.root(self._one(token_id))], [cache.next_place])
            rows_of.append(passes.forward(flat, cache, stage="probe").logits[0, -1])
            cache.commit([[0]])
        return torch.stack(rows_of)

    def usual_logits(self, caller: nn.Module) -> Tensor:
        """By the passes of transformers' generate, with its own cache and masks."""
        config: Any = self.model.config
        arguments = {cache_argument(self.model): DynamicCache(config=config), "use_cache": True}
        rows, num_seen = [], 0
        for token_ids in (torch.cat([self.prefix, self._one(self.root)]), self._one(self.child)):
            positions = torch.arange(num_seen, num_seen + token_ids.numel(), device=token_ids.device)
            num_seen += token_ids.numel()
            try:
                step = caller(input_ids=token_ids[None], position_ids=positions[None], **arguments)
                rows.append(step.logits[0, -1])
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                raise ForwardPassError(f"{type(error).__name__}: {error}") from error
        return torch.stack(rows)

    def _level(self, tree: TokenTree, parents: list[int], token_ids: list[int]) -> TokenTree:
        """The tree with one more level."""
        device = self.prefix.device
        logprob = torch.full((len(parents),), -1.0, device=device)
        return tree.grow(torch.tensor(parents, device=device), torch.tensor(token_ids, device=device), logprob)

    def _prefilled(self) -> tuple[Passes, TreeCache]:
        passes = Passes(EagerRunner(self.model), StageClock(self.prefix.device))
        cache = TreeCache(self.prefix.numel() + WIDE_ROWS)
        passes.prefill(self.prefix, cache)
        return passes, cache

    def _one(self, token_id: int) -> Tensor:
        return torch.tensor([token_id], device=self.prefix.device)
