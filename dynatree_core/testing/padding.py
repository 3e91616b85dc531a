"""Trees with padding, whose numbers the host may not read: what hooks are shown that are marked `is_capturable`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["HostRead", "UnreadTensor", "padded", "padded_frontier"]

# methods and functions that need a tensor's numbers on the host, if only to know how large their result is
_READS = frozenset(
    {
        *(
            "item",
            "tolist",
            "numpy",
            "cpu",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "__complex__",
            "__array__",
        ),
        *("__contains__", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
        *("bincount", "equal", "allclose", "histc"),
    }
)


class HostRead(Exception):
    """A hook has read numbers that a GPU may not have computed yet."""


class UnreadTensor(Tensor):
    """A tensor whose numbers stay on its device: what would read them on the host raises `HostRead`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS or (name == "where" and len(args) == 1 and not kwargs) or _indexes_by_numbers(name, args):
            raise HostRead(
                f"hooks that are marked is_capturable must not read a tensor's numbers on the host, got a call of "
                f"{name}; answer with a tensor"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _indexes_by_numbers(name: str, arguments: Any) -> bool:
    """Whether an index is made of bools, or is one number of the device: the host is asked for both."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
    return any(isinstance(one, Tensor) and (one.dtype in (torch.bool, torch.uint8) or one.ndim == 0) for one in index)


def padded(tree: TokenTree, width: int) -> TokenTree:
    """A tree that was not pruned, with padding behind the nodes of each level but the root's.

    Args:
        tree: the tree.
        width: places of a level, as many as its largest has nodes at least.
    """
    places, live, start = [0], [0], 1  # of each node, in the padded tree; of each place, the node
    parents = [-1]
    for level, size in enumerate(tree.level_sizes[1:]):
        first = 1 + level * width
        places += range(first, first + size)
        live += [*range(start, start + size), *[-1] * (width - size)]
        # padding is a child of the last place, so that parents ascend
        parents += [places[parent] for parent in tree.parent[start : start + size].tolist()]
        parents += [first - 1] * (width - size)
        start += size
    node, parent = torch.tensor(live), torch.tensor(parents)
    is_padding = node < 0
    mask = torch.zeros(len(live), len(live), dtype=torch.bool)
    for place, above in enumerate(parents):
        mask[place] = mask[above] if above >= 0 else False
        mask[place, place] = True
    return TokenTree(
        token_ids=tree.token_ids[node].masked_fill(is_padding, 0),
        parent=parent,
        logprob=tree.logprob[node].masked_fill(is_padding, -torch.inf),
        cum_logprob=tree.cum_logprob[node].masked_fill(is_padding, -torch.inf),
        ancestor_mask=mask,
        level_sizes=(1, *[width] * tree.max_depth),
        is_padded=True,
    )


def padded_frontier(frontier: Frontier, width: int) -> Frontier:
    """The same frontier on a padded tree, where the drafter is sure of what it says about padding."""
    tree, proposals = padded(frontier.tree, width), frontier.proposals
    missing = tree.level_sizes[-1] - frontier.width
    surely = torch.full((missing, frontier.max_branch), -20.0)
    surely[:, :1] = -1e-4
    ids = torch.cat([proposals.token_ids, torch.zeros(missing, frontier.max_branch, dtype=torch.int64)])
    proposals = Proposals(unread(ids), unread(torch.cat([proposals.logprobs, surely])), proposals.is_free)
    left = unread(torch.tensor(frontier.nodes_left))
    return attrs.evolve(frontier, tree=unread_tree(tree), nodes_left=lambda: left, propose=lambda: proposals)


def unread(tensor: Tensor) -> Tensor:
    """The same numbers, not to be read on the host."""
    return tensor.as_subclass(UnreadTensor)


def unread_tree(tree: TokenTree) -> TokenTree:
    """The same tree, likewise."""
    names = ("token_ids", "parent", "logprob", "cum_logprob", "ancestor_mask")
    parts: dict[str, Any] = {name: unread(getattr(tree, name)) for name in names}
    return attrs.evolve(tree, **parts)
