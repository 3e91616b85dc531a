"""Trees whose levels have one width, so that no size of theirs has to be read back from the device.

A level that is grown node by node has a size which only the device knows, and the host that is to launch the next level
waits for it. Here each level has the same number of places. Its nodes stand first, breadth first as in any tree;
behind them stands padding, which has the log-probability -inf and is nobody's parent but padding's. How many nodes
there are is read once, together with what the target says of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.token_tree import Cut, Room, TokenTree

__all__ = ["WIDTHS", "PaddedGrowth", "PaddedRows", "PaddedSpace", "least_width"]

WIDTHS = (1, 16, 32, 64)  # places that a level may have
FIRST_HEARD = 2  # level of whose children the host hears before the verdict whether there are any


def least_width(max_nodes: int, tau: float, max_width: int | None) -> int | None:
    """The places of a level that are enough whatever the drafter says; None where `WIDTHS` has no such number.

    Args:
        max_nodes: drafted nodes of a tree at most.
        tau: the least probability of a path; paths of one level have 1 between them.
        max_width: nodes of a level that the policies want at most; None: nobody knows.
    """
    most = _most_admitted(max_nodes, tau, max_width)
    return next((width for width in WIDTHS if width >= most), None)


def _most_admitted(most: int, tau: float, max_width: int | None) -> int:
    """Paths of one level that are probable enough and wanted, of so many at most."""
    most = most if tau <= 0 else min(most, int(1 / tau + 1e-6))
    return most if max_width is None else min(most, max_width)


class PaddedSpace:
    """Where the proposals for one sequence's trees are laid out, level by level; used again by each of its trees.

    Args:
        width: places of a level.
        max_branch: children that are proposed for each.
        max_depth: levels of a tree at most.
        device: of the trees.
    """

    def __init__(self, width: int, max_branch: int, max_depth: int, device: torch.device) -> None:
        self.width, self.max_branch, self.max_depth = width, max_branch, max_depth
        with torch.inference_mode(False):  # so that iterations in and outside of that mode may write into it
            self.places = torch.arange(width, device=device)
            self.ranks = torch.arange(max_branch, device=device)
            self.depths = torch.arange(max_depth + 1, device=device)
            # of each place of a tree, and of padding behind them: its depth; and its level, -1 for padding
            levels = 1 + torch.arange(max_depth * width, device=device) // width
            nothing = torch.zeros(1, dtype=torch.int64, device=device)
            ends = torch.cat([nothing, levels, nothing]), torch.cat([nothing, levels, nothing - 1])
            self.place_depths = torch.stack(ends)  # [2, places + 1]
            self._levels = [self._room_for_level(depth, device) for depth in range(max_depth)]
        # one for all trees: the next one begins when the host has read the verdict on the one before
        self.heard = _HeardLate(max_depth) if device.type == "cuda" else None

    @property
    def num_places(self) -> int:
        """Of a tree, with its root."""
        return 1 + self.max_depth * self.width

    def _room_for_level(self, depth: int, device: torch.device) -> _LevelRoom:
        width = 1 if depth == 0 else self.width
        first, size = (1 + (depth - 1) * self.width if depth else 0), width * self.max_branch
        integers = torch.zeros(2, size + 1, dtype=torch.int64, device=device)
        # padding is a child of the last place, so that parents ascend
        integers[1] = first + (torch.arange(size + 1, device=device) // self.max_branch).clamp(max=width - 1)
        return _LevelRoom(integers, torch.full((2, size + 1), -torch.inf, device=device, dtype=torch.float32))

    def laid_out(
        self, depth: int, proposals: Proposals, cum_logprob: Tensor, num_columns: int, vocab_size: int
    ) -> _LevelRoom:
        """Lay out proposals [width, k] for nodes whose paths have these log-probabilities [width].

        The first `num_columns` children of each get the log-probability of their path, the others -inf.
        """
        room, shape = self._levels[depth], proposals.logprobs.shape
        # a token that nobody knows is refused when the host looks; until then it must have an embedding
        torch.clamp(proposals.token_ids, 0, vocab_size - 1, out=room.integers[0, :-1].view(shape))
        room.scores[0, :-1].view(shape).copy_(proposals.logprobs)
        of_paths = room.scores[1, :-1].view(shape)
        torch.add(cum_logprob[:, None], proposals.logprobs[:, :num_columns], out=of_paths[:, :num_columns])
        if num_columns < room.num_columns:
            of_paths[:, num_columns:].fill_(-torch.inf)
        room.num_columns = num_columns
        return room


class _HeardLate:
    """Numbers of the device that the host hears of without waiting, when they have come, for one of each level."""

    def __init__(self, num_levels: int) -> None:
        self._numbers = torch.empty(num_levels, dtype=torch.int64, pin_memory=True)
        self._events = [torch.cuda.Event() for _ in range(num_levels)]  # type: ignore[no-untyped-call]

    def send(self, level: int, number: Tensor) -> None:
        """Have a number [1] int64 sent to the host."""
        self._numbers[level : level + 1].copy_(number, non_blocking=True)
        self._events[level].record()

    def number(self, level: int) -> int | None:
        """A level's number, if it has come."""
        has_come = self._events[level].query()  # type: ignore[no-untyped-call]
        return int(self._numbers[level]) if has_come else None


@attrs.define(eq=False)
class _LevelRoom:
    """The proposals for one level, flat, and a place for padding behind them."""

    integers: Tensor  # [2, places] int64: tokens and parents
    scores: Tensor  # [2, places] float32: log-probabilities of the children, and of their paths
    num_columns: int = 0  # children of each node whose paths' log-probabilities are written


class PaddedGrowth:
    """How one padded tree grows, and what the host has to look at when it next waits.

    Args:
        space: where proposals are laid out.
        max_nodes: drafted nodes of the tree at most.
        tau: the least probability of a path.
        vocab_size: token ids that the target knows.
    """

    def __init__(self, space: PaddedSpace, *, max_nodes: int, tau: float, vocab_size: int) -> None:
        self.space, self.max_nodes, self.vocab_size = space, max_nodes, vocab_size
        self._tau = tau
        self._most = [1]  # nodes that each level has at most
        self.proposals: list[Proposals] = []  # of each level
        self._sent: list[tuple[int, int]] = []  # levels of which the host will hear, and what it hears of empty ones
        self._is_over = False
        # where a policy answered with a tensor: that, paths' probabilities, and its name
        self._widths: list[tuple[Tensor, Tensor, str | None]] = []

    def root(self, token_id: Tensor) -> TokenTree:
        """The tree that holds only the last committed token [1] int64."""
        return TokenTree.padded_root(token_id, self.space.num_places)

    @property
    def is_over(self) -> bool:
        """Whether the host knows that the last level is empty. It may know too late, which costs passes and no node."""
        heard = self.space.heard
        if heard is not None:
            self._is_over |= any(heard.number(level) == nothing for level, nothing in self._sent)
        return self._is_over

    def _note(self, level: int, chosen: Tensor, nothing: int) -> None:
        """Let the host hear of a level whether it is empty; the first levels hardly ever are."""
        if chosen.device.type == "cpu":
            self._is_over = int(chosen[0]) == nothing
        elif self.space.heard is not None and level >= FIRST_HEARD:
            self.space.heard.send(level, chosen[:1])
            self._sent.append((level, nothing))

    def nodes_left(self, tree: TokenTree) -> Tensor:
        """[] int64: drafted nodes that the budget still allows."""
        return self.max_nodes + 1 - tree.is_live.sum()

    def grown(
        self,
        frontier: Frontier,
        expand: Tensor | bool,
        branch: Tensor | int,
        max_width: int | None,
        decider: str | None = None,
    ) -> TokenTree:
        """The tree with one more level, of the best children that fit, as policies want them.

        Args:
            frontier: of the tree so far.
            expand: bool [width], or True: which nodes are expanded.
            branch: int64 [width], or one number: children that each is wanted to have.
            max_width: nodes of a level that whoever has said so wants at most; None: nobody knows.
            decider: who that is.
        """
        tree, proposals, space = frontier.tree, frontier.proposals, self.space
        num_columns = min(branch, space.max_branch) if isinstance(branch, int) else space.max_branch
        cum_logprob = frontier.cum_logprob
        if isinstance(expand, Tensor):
            cum_logprob = torch.where(expand, cum_logprob, -torch.inf)
        room = space.laid_out(tree.max_depth, proposals, cum_logprob, num_columns, self.vocab_size)
        of_paths = room.scores[1, :-1]
        is_admitted = of_paths >= math.log(self._tau) if self._tau > 0 else of_paths > -torch.inf
        if isinstance(branch, Tensor):
            is_admitted &= (space.ranks < branch[:, None]).flatten()
            self._widths.append((branch, frontier.cum_logprob, decider))
        self.proposals.append(proposals)
        chosen = self._chosen(tree, of_paths, is_admitted, num_columns, max_width)
        self._note(tree.max_depth, chosen, of_paths.numel())
        return tree.grow_padded(chosen, room.integers, room.scores)

    def _chosen(
        self, tree: TokenTree, of_paths: Tensor, is_admitted: Tensor, num_columns: int, max_width: int | None
    ) -> Tensor:
        """[width] int64: places of the best children that fit, ascending; behind them that of padding."""
        width, nothing = self.space.width, of_paths.numel()
        most = _most_admitted(self._most[-1] * num_columns, self._tau, max_width)
        fits_budget = sum(self._most[1:]) + most <= self.max_nodes
        self._most.append(min(most, width, self.max_nodes))
        if most <= width and fits_budget:
            return torch.nonzero_static(is_admitted, size=width, fill_value=nothing)[:, 0]
        # stable: of equals the first, as without padding
        values, places = torch.where(is_admitted, of_paths, -torch.inf).sort(descending=True, stable=True)
        is_chosen = values[:width] > -torch.inf
        if not fits_budget:
            is_chosen &= self.space.places[: is_chosen.numel()] < self.nodes_left(tree)
        chosen = torch.where(is_chosen, places[:width], nothing).sort().values
        return torch.nn.functional.pad(chosen, (0, width - chosen.numel()), value=nothing)

    def most_rows(self, max_kept: int | None) -> int:
        """Rows that are enough for the tree's nodes, of which policies keep so many drafted ones at most."""
        most = min(self.max_nodes, sum(self._most[1:]))
        return 1 + (most if max_kept is None else min(most, max_kept))

    def checks(self, tree: TokenTree) -> Tensor:
        """[5] int64: the least and the greatest token proposed, whether all probabilities are numbers, and the least
        and the greatest width that policies want of nodes that are there."""
        min_id, max_id = torch.cat([one.token_ids for one in self.proposals]).aminmax()
        logprobs = torch.cat([one.logprobs for one in self.proposals])
        is_sound = (logprobs <= 1e-3).all(dim=1) | ~tree.is_live[: len(logprobs)]
        numbers = [min_id, max_id, is_sound.all().long()]
        if self._widths:
            numbers += torch.cat([_of_live(*level[:2]) for level in self._widths]).aminmax()
        else:
            numbers += [is_sound.new_zeros((), dtype=torch.int64)] * 2
        return torch.stack(numbers)

    def first_beyond(self, max_branch: int) -> str | None:
        """The policy that has first wanted a width out of range. The host waits for the device."""
        for branch, of_paths, decider in self._widths:
            widths = _of_live(branch, of_paths)
            if bool(((widths < 0) | (widths > max_branch)).any()):
                return decider
        return None


def _of_live(widths: Tensor, of_paths: Tensor) -> Tensor:
    """Widths that are wanted of nodes, 0 of padding."""
    return widths.masked_fill(of_paths == -torch.inf, 0)


@attrs.frozen(eq=False)
class PaddedRows:
    """The nodes of a padded tree in the rows of one pass: those that are there first, padding behind them.

    A padding row has the root's position, and sees the text and padding. Nobody sees it.
    """

    _room: Room = attrs.field(repr=False)
    depth: Tensor  # [rows] int64; 0 for padding
    draft_index: Tensor  # [rows] int64: places in the padded tree
    max_depth: int  # levels of the padded tree
    _level: Tensor = attrs.field(repr=False)  # [rows] int64: the depth; -1 for padding
    drafted: TokenTree  # the padded tree
    _depths: Tensor = attrs.field(repr=False)  # [levels] int64: 0, 1, 2, …

    @classmethod
    def of(cls, tree: TokenTree, keep: Tensor | None, growth: PaddedGrowth, max_kept: int | None) -> PaddedRows:
        """The rows of a padded tree.

        Args:
            tree: with one level at least.
            keep: bool [nodes], the nodes worth verifying; None: all.
            growth: by which it grew.
            max_kept: drafted nodes that are kept at most; None: nobody knows.
        """
        space = growth.space
        is_row = tree.is_live if keep is None else tree.is_live & tree.close_under_ancestors(keep)
        order = torch.nonzero_static(is_row, size=growth.most_rows(max_kept), fill_value=space.num_places)[:, 0]
        depth, level = space.place_depths.index_select(1, order)
        depths = space.depths[: 1 + tree.max_depth]
        return cls(tree.gathered(order), depth, order, tree.max_depth, level, tree, depths)

    @property
    def token_ids(self) -> Tensor:
        """[rows] int64; 0 for padding."""
        return self._room.integers[0]

    @property
    def parent(self) -> Tensor:
        """[rows] int64, -1 for the root."""
        return self._room.integers[1]

    @property
    def ancestor_mask(self) -> Tensor:
        """[rows, rows] bool, row i marks node i and its ancestors."""
        return self._room.mask

    @property
    def reach(self) -> Tensor:
        """[rows] int64: how far the path to each leads; less than the root for padding."""
        return self._level

    @property
    def num_nodes(self) -> int:
        """Rows, padding among them."""
        return self.token_ids.numel()

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    @property
    def level_sizes(self) -> Tensor:
        """[levels] int64: nodes at depth 0, 1, …; from some depth on 0."""
        return (self._level == self._depths[:, None]).sum(dim=1)

    def tree(self, level_sizes: Sequence[int]) -> TokenTree:
        """The tree without padding, by what the host has learnt of its levels. Its places are views of these."""
        num_nodes = sum(level_sizes)
        order = self.draft_index[:num_nodes]
        cut = Cut(self.depth[:num_nodes], functools.partial(self._ranks, order), order)
        return TokenTree.in_room(self._room, tuple(size for size in level_sizes if size), cut=cut)

    def _ranks(self, order: Tensor) -> Tensor:
        return self.drafted.rank.index_select(0, order)
