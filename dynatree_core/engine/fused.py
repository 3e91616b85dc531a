"""Levels of padded trees by one kernel of Triton instead of a dozen of torch, where a GPU is seen to write the same.

What is written decides who sees whom, so nothing is believed: before the first tree of a width grows, made-up levels
are written both ways on that device and compared. Where they differ, or Triton cannot compile there, a warning says so,
and torch writes the levels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dynatree_core.ops.triton import reason_unavailable
from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.padded import PaddedGrowth, PaddedSpace, WantedLevel, WriteLevel
from dynatree_core.tree.token_tree import Room, TokenTree

__all__ = ["FusedLevels", "checked", "level_writer"]

MOST_PROPOSED = 1024  # children for one level, since every program of the kernel compares each with each
CHECKED_DEPTH = 3  # levels of a tree that is made up
VOCAB_SIZE = 50  # of its tokens


@functools.cache
def level_writer(device: torch.device, width: int, max_branch: int) -> WriteLevel | None:
    """What writes levels of so many places by one kernel; None where `write_plainly` does it."""
    if device.type != "cuda" or reason_unavailable() is not None:
        return None
    if width * max_branch > MOST_PROPOSED:
        return None
    return checked(lambda: FusedLevels(width, max_branch, device), width, max_branch, device)


class FusedLevels:
    """Writes levels as `write_plainly` does, by one kernel.

    Args:
        width: places of a level.
        max_branch: children that are proposed for each.
        device: of the trees.
    """

    def __init__(self, width: int, max_branch: int, device: torch.device) -> None:
        from dynatree_core.ops.triton.levels import write_level  # a command on a CPU starts without Triton

        self._write_level = write_level
        is_interpreted = device.type == "cpu"  # in tests
        self._on_device: Callable[[], AbstractContextManager[object]] = (
            nullcontext if is_interpreted else functools.partial(torch.cuda.device, device)
        )
        with torch.inference_mode(False):
            self._all = torch.ones(width, dtype=torch.bool, device=device)
            numbers = torch.arange(max_branch + 1, device=device)
            self._same = numbers[:, None].repeat(1, max(width, 2))  # rows whose addresses are multiples of 16

    def __call__(self, space: PaddedSpace, wanted: WantedLevel, room: Room, level: slice) -> None:
        """A `WriteLevel`."""
        assert room.packed is not None, "a padded tree's room is packed"
        proposals, num_nodes = wanted.proposals, wanted.tree.level_sizes[-1]
        with self._on_device():  # a kernel of Triton runs on the current one
            self._write_level(
                room.packed,
                room.mask,
                proposals.logprobs,
                proposals.token_ids,
                wanted.expand if isinstance(wanted.expand, Tensor) else self._all[:num_nodes],
                wanted.branch if isinstance(wanted.branch, Tensor) else self._same[wanted.num_columns, :num_nodes],
                old=level.start,
                width=space.width,
                least=wanted.least,
                max_nodes=wanted.max_nodes,
                vocab_size=wanted.vocab_size,
            )


def checked(make: Callable[[], WriteLevel], width: int, max_branch: int, device: torch.device) -> WriteLevel | None:
    """A writer of levels, if it writes on this device what torch does; None, with a warning, where it does not."""
    try:
        write = make()
        is_same = all(_are_same(write, width, max_branch, device, seed) for seed in range(4))
        why = "they come out otherwise"
    except Exception as error:  # noqa: BLE001  # whatever it is, torch writes the levels
        is_same, why = False, f"{type(error).__name__}: {error}"
    if is_same:
        return write
    warnings.warn(
        f"levels of {width} places cannot be written by one Triton kernel on {device}, so torch writes them by a dozen "
        f"({why})",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _are_same(write: WriteLevel, width: int, max_branch: int, device: torch.device, seed: int) -> bool:
    """Whether a made-up tree is the same, written by it and by torch: its columns, and who sees whom."""
    trees = [_made_up(way, width, max_branch, device, seed) for way in (None, write)]
    names = ("token_ids", "parent", "logprob", "cum_logprob", "rank", "depth", "ancestor_mask")
    return all(torch.equal(*(getattr(tree, name) for tree in trees)) for name in names)


def _made_up(write: WriteLevel | None, width: int, max_branch: int, device: torch.device, seed: int) -> TokenTree:
    """A padded tree of which all is made up: scores with ties, and levels that are cut by all that can cut them.

    The four lowest seeds have a budget that ends within the tree or none, and a threshold or none.
    """
    space = PaddedSpace(width, max_branch, CHECKED_DEPTH, device, write)
    max_nodes = 2 * width if seed & 1 else CHECKED_DEPTH * width
    growth = PaddedGrowth(space, max_nodes=max_nodes, tau=0.02 if seed & 2 else 0.0, vocab_size=VOCAB_SIZE)
    generator = torch.Generator().manual_seed(seed)
    tree = growth.root(torch.tensor([seed], device=device))
    for depth in range(CHECKED_DEPTH):
        num_nodes = tree.level_sizes[-1]
        shape = (num_nodes, max_branch)
        # multiples of 1/4 have sums that tie; a few tokens are none that the target knows
        logprobs = -torch.randint(1, 9, shape, generator=generator).sort(dim=1).values / 4
        token_ids = torch.randint(-1, VOCAB_SIZE + 1, shape, generator=generator)
        branch = torch.randint(0, max_branch + 2, (num_nodes,), generator=generator)
        expand = torch.rand(num_nodes, generator=generator) < 0.8
        if depth == 0:
            branch[:], expand[:] = max_branch, True
        proposals = Proposals(token_ids.to(device), logprobs.to(device))
        frontier = Frontier(tree, 0, max_nodes, max_branch, functools.partial(_given, proposals))
        wanted = (expand.to(device) if seed & 2 else True), (branch.to(device) if depth != 1 else max_branch)
        tree = growth.grown(frontier, *wanted, None)
    return tree


def _given(proposals: Proposals) -> Proposals:
    return proposals
