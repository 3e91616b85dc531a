"""The columns of nodes in a trace: those of the drafted trees, and the proposed children that are not in them.

Many iterations are read at once, a column of all of them by one operation: nothing is done for a node by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core.engine.observer import Level, Outcome, on_host, outcomes_of
from dynatree_core.trace.format import dumps, float_list, int_list
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["Nodes", "nodes_of"]

Numbers = npt.NDArray[Any]


@attrs.frozen(eq=False)
class Nodes:
    """The nodes of an iteration: those of the drafted tree, then the proposed children that were refused."""

    token: list[int]
    parent: list[int]
    rank: list[int]  # among all that the drafter has proposed for the parent
    depth: list[int]
    outcome: list[int]
    source: list[int]  # place in `sources`; -1 for the root
    logprob: list[float]
    cum_logprob: list[float]
    sources: list[str]  # the drafters of a union that were asked; none without one

    def json(self) -> str:
        """The columns, and who the sources are, as members of a JSON object."""
        names = ("token", "parent", "rank", "depth", "outcome", *(["source"] if self.sources else []))
        integers = ",".join(f'"{name}":{int_list(getattr(self, name))}' for name in names)
        floats = f'"logprob":{float_list(self.logprob)},"cum_logprob":{float_list(self.cum_logprob)}'
        return f'"sources":{dumps(self.sources or None)},"nodes":{{{integers},{floats}}}'


def nodes_of(drafts: Sequence[tuple[TokenTree, Sequence[Level]]]) -> list[Nodes]:
    """The nodes of some iterations, by the tree that each has drafted and the levels that it was told of."""
    trees = [tree for tree, _ in drafts]
    starts = np.cumsum([0, *(tree.num_nodes for tree in trees)])  # of each tree's nodes among those of all
    drafted = {
        "token": on_host([tree.token_ids for tree in trees]),
        "parent": on_host([tree.parent for tree in trees]),
        "rank": np.zeros(starts[-1], dtype=np.int64),
        "depth": np.concatenate([np.repeat(np.arange(1 + tree.max_depth), tree.level_sizes) for tree in trees]),
        "outcome": np.zeros(starts[-1], dtype=np.int64),
        "source": np.full(starts[-1], -1),
        # of float32 numbers, whose sums are those of Python's floats
        "logprob": on_host([tree.logprob for tree in trees]).astype(np.float64),
        "cum_logprob": on_host([tree.cum_logprob for tree in trees]).astype(np.float64),
    }
    sources: list[list[str]] = [[] for _ in drafts]
    asked = [
        (place, level) for place, (_, levels) in enumerate(drafts) for level in levels if level.proposals is not None
    ]
    refused: dict[str, Numbers] = {name: column[:0] for name, column in drafted.items()}
    refused_starts = np.zeros(len(drafts) + 1, dtype=np.int64)
    if asked:
        proposed = _proposed([level for _, level in asked], [sources[place] for place, _ in asked])
        place = np.repeat([place for place, _ in asked], [_size(level) for _, level in asked])
        is_admitted = proposed["outcome"] == Outcome.ADMITTED
        is_node = np.ones(starts[-1], dtype=bool)
        is_node[starts[:-1]] = False  # roots
        for name in ("rank", "source"):  # admitted children are nodes in the order in which they were proposed
            drafted[name][is_node] = proposed[name][is_admitted]
        is_refused = ~is_admitted & (proposed["outcome"] != Outcome.NO_TOKEN)
        refused = {name: column[is_refused] for name, column in proposed.items()}
        refused["cum_logprob"] = (
            refused["logprob"] + drafted["cum_logprob"][starts[place[is_refused]] + refused["parent"]]
        )
        refused_starts[1:] = np.cumsum(np.bincount(place[is_refused], minlength=len(drafts)))
    listed = {name: (column.tolist(), refused[name].tolist()) for name, column in drafted.items()}
    return [
        Nodes(
            **{name: nodes[first:last] + others[begin:end] for name, (nodes, others) in listed.items()},
            sources=names,
        )
        for names, (first, last), (begin, end) in zip(
            sources, itertools.pairwise(starts.tolist()), itertools.pairwise(refused_starts.tolist()), strict=True
        )
    ]


def _size(level: Level) -> int:
    assert level.proposals is not None, "the drafter was asked"
    return level.proposals.token_ids.numel()


def _proposed(levels: Sequence[Level], sources: Sequence[list[str]]) -> dict[str, Numbers]:
    """The columns of all that was proposed for some levels, [proposals] each, but for their paths' probabilities.

    Args:
        levels: whose drafter was asked.
        sources: for each the list to which names of a union's drafters are added.
    """
    proposals = [level.proposals for level in levels if level.proposals is not None]
    sizes = [one.token_ids.numel() for one in proposals]
    starts = np.cumsum([0, *sizes[:-1]])

    def repeated(numbers: Sequence[int] | Numbers) -> Numbers:
        return np.repeat(numbers, sizes)

    row, rank = np.divmod(
        np.arange(sum(sizes)) - repeated(starts), repeated([one.token_ids.shape[1] for one in proposals])
    )
    return {
        "token": on_host([one.token_ids for one in proposals]),
        "parent": repeated([level.tree.last_level.start for level in levels]) + row,
        "rank": rank,
        "depth": repeated([level.tree.max_depth + 1 for level in levels]),
        "outcome": outcomes_of(levels),
        "source": _sources(proposals, sources),
        "logprob": on_host([one.logprobs for one in proposals]).astype(np.float64),
    }


def _sources(proposals: Sequence[Proposals], sources: Sequence[list[str]]) -> Numbers:
    """[proposals] which drafter of a union has given each most of its probability; -1 without a union."""
    for one, names in zip(proposals, sources, strict=True):
        names += [name for name, _ in one.heard if name not in names]
    alone = [names.index(one.heard[0][0]) if one.heard else -1 for one, names in zip(proposals, sources, strict=True)]
    found = np.repeat(alone, [one.token_ids.numel() for one in proposals])
    starts = itertools.accumulate((one.token_ids.numel() for one in proposals), initial=0)
    alike: dict[tuple[int, ...], list[tuple[Proposals, list[str], int]]] = {}  # by widths, with where each begins
    for one, names, start in zip(proposals, sources, starts, strict=False):
        if len(one.heard) > 1:
            widths = (one.token_ids.shape[1], *(part.token_ids.shape[1] for _, part in one.heard))
            alike.setdefault(widths, []).append((one, names, start))
    for group in alike.values():
        ends = np.cumsum([len(one.token_ids) for one, _, _ in group])
        most = np.split(_most_from([one for one, _, _ in group]), ends)  # behind the last end is nothing
        for (one, names, start), places in zip(group, most, strict=False):
            found[start : start + places.size] = np.array([names.index(name) for name, _ in one.heard])[places.ravel()]
    return found


def _most_from(alike: Sequence[Proposals]) -> Numbers:
    """[width of all, k] places in `heard`, of the drafter that adds most to a proposal's probability.

    Args:
        alike: as wide as each other, and so is what their drafters have proposed.
    """
    token_ids = _rows([one.token_ids for one in alike])[:, :, None]
    left_over = np.ones((len(token_ids), 1))
    shares = []  # of each drafter, [width, k]; the first one heard first
    for place in range(len(alike[0].heard)):
        parts = [one.heard[place][1] for one in alike]
        part_ids, logprobs = _rows([one.token_ids for one in parts]), _rows([one.logprobs for one in parts])
        probs = left_over * np.exp(logprobs.astype(np.float64))  # [width, its k]
        shares.append(((token_ids == part_ids[:, None, :]) * probs[:, None, :]).sum(axis=-1))
        left_over = np.maximum(left_over - probs.sum(axis=-1, keepdims=True), 0.0)
    most: Numbers = np.argmax(shares, axis=0)
    return most


def _rows(tensors: Sequence[Tensor]) -> Numbers:
    """[rows of all, k] the numbers of tensors [rows, k]."""
    rows: Numbers = torch.cat([*tensors]).cpu().numpy()
    return rows
