"""Trees whose levels have one width, so that no size of theirs has to be read back from the device.

A level that is grown node by node has a size which only the device knows, and the host that is to launch the next level
waits for it. Here each level has the same number of places. Its nodes stand first, breadth first as in any tree;
behind them stands padding, which has the log-probability -inf and is nobody's parent but padding's. How many nodes
there are is read once, together with what the target says of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.token_tree import Cut, Room, TokenTree, packed_scores

__all__ = [
    "WIDTHS",
    "PaddedGrowth",
    "PaddedRows",
    "PaddedSpace",
    "WantedLevel",
    "WriteLevel",
    "least_width",
    "write_plainly",
]

WIDTHS = (1, 16, 32, 64)  # places that a level may have
LEAST_SCORE = torch.finfo(torch.float32).min  # of a path that is possible at all
NO_TOKEN = -(2**40)  # less than anything that a drafter could take for one
NO_NODE = -(2**55) + 2**32 - 2**23  # both scores of padding, -inf, as one number
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
        write: what writes a level; None: `write_plainly`.
    """

    def __init__(
        self, width: int, max_branch: int, max_depth: int, device: torch.device, write: WriteLevel | None = None
    ) -> None:
        self.width, self.max_branch, self.max_depth = width, max_branch, max_depth
        self.write = write_plainly if write is None else write
        with torch.inference_mode(False):  # so that iterations in and outside of that mode may write into it
            self.places = torch.arange(width, device=device)
            self.ranks = torch.arange(max_branch, device=device)
            self.depths = torch.arange(max_depth + 1, device=device)
            self.impossible = torch.tensor(-torch.inf, dtype=torch.float32, device=device)  # [], at hand on the device
            self.no_token = torch.tensor(NO_TOKEN, device=device)  # [] int64
            # what a score adds to the log-probability of a child: nothing, and that of its parent's path
            self.of_scores = torch.tensor([0.0, 1.0], dtype=torch.float32, device=device)
            self._empty = self._empty_tree(device)
            self._levels = [self._room_for_level(depth, device) for depth in range(max_depth)]
        # one for all trees: the next one begins when the host has read the verdict on the one before
        self.heard = _HeardLate(max_depth) if device.type == "cuda" else None

    @property
    def num_places(self) -> int:
        """Of a tree, with its root."""
        return 1 + self.max_depth * self.width

    def _empty_tree(self, device: torch.device) -> Tensor:
        """[bytes] uint8: a room with a root without a token, and with places that are empty."""
        size = self.num_places + 1
        places = torch.zeros(6, size, dtype=torch.int64, device=device)
        packed_scores(places[2]).fill_(-torch.inf)
        places[1, 0] = -1
        places[2, 0] = 0
        levels = 1 + torch.arange(self.max_depth * self.width, device=device) // self.width
        places[4, 1:-1] = places[5, 1:-1] = levels
        places[5, -1] = -1  # padding is of no level
        mask = torch.eye(size, dtype=torch.bool, device=device)
        return torch.cat([places.view(torch.uint8).flatten(), mask.view(torch.uint8).flatten()])

    def new_room(self) -> Room:
        """Where a tree grows, in memory that nobody else has; it takes one kernel to empty."""
        size = self.num_places + 1
        memory = self._empty.clone()
        places, mask = memory[: 48 * size], memory[48 * size :]
        return Room.of_packed(places.view(torch.int64).view(6, size), mask.view(torch.bool).view(size, size))

    def _room_for_level(self, depth: int, device: torch.device) -> _LevelRoom:
        width = 1 if depth == 0 else self.width
        first, size = (1 + (depth - 1) * self.width if depth else 0), width * self.max_branch
        places = torch.zeros(4, size + 1, dtype=torch.int64, device=device)
        # padding is a child of the last place, so that parents ascend
        places[1] = first + (torch.arange(size + 1, device=device) // self.max_branch).clamp(max=width - 1)
        packed_scores(places[2]).fill_(-torch.inf)
        places[3] = torch.arange(size + 1, device=device) % self.max_branch
        return _LevelRoom(places, torch.tensor(size, device=device))

    def laid_out(self, wanted: WantedLevel, cum_logprob: Tensor) -> _LevelRoom:
        """Lay out proposals [width, k] for nodes whose paths have these log-probabilities [width].

        The first `num_columns` children of each get the log-probability of their path, the others -inf.
        """
        proposals, num_columns = wanted.proposals, wanted.num_columns
        room, shape = self._levels[wanted.tree.max_depth], proposals.logprobs.shape
        # a token that nobody knows is refused when the host looks; until then it must have an embedding
        torch.clamp(proposals.token_ids, 0, wanted.vocab_size - 1, out=room.places[0, :-1].view(shape))
        scores = room.scores[:-1].view(*shape, 2)
        if num_columns < room.num_columns:
            scores[:, num_columns:].fill_(-torch.inf)
        room.num_columns = num_columns
        # both scores by one kernel. Below a path that is impossible the first one is 0 · -inf; nobody is chosen there
        logprobs = proposals.logprobs[:, :num_columns, None]
        torch.addcmul(logprobs, cum_logprob[:, None, None], self.of_scores, out=scores[:, :num_columns])
        return room


class _HeardLate:
    """Numbers of the device that the host hears of without waiting, when they have come, for one of each level."""

    def __init__(self, num_levels: int) -> None:
        self._numbers = torch.empty(num_levels, dtype=torch.int64, device="cpu", pin_memory=True)
        self._events = [torch.cuda.Event() for _ in range(num_levels)]  # type: ignore[no-untyped-call]

    def send(self, level: int, number: Tensor) -> None:
        """Have a number [1] int64 sent to the host."""
        self._numbers[level : level + 1].copy_(number, non_blocking=True)
        self._events[level].record()

    def number(self, level: int) -> int | None:
        """A level's number, if it has come."""
        has_come = self._events[level].query()  # type: ignore[no-untyped-call]
        return int(self._numbers[level]) if has_come else None

    def wait_for(self, level: int) -> None:
        """Let the device come up to a level. It does not run dry where it has a later one to do."""
        self._events[level].synchronize()


@attrs.define(eq=False)
class _LevelRoom:
    """The proposals for one level, flat, and a place for padding behind them."""

    places: Tensor  # [4, places] int64: tokens, parents, both scores, and ranks
    last: Tensor  # [] int64: the place for padding
    num_columns: int = 0  # children of each node whose paths' log-probabilities are written

    @property
    def scores(self) -> Tensor:
        """[places, 2] float32: log-probabilities of the children, and of their paths."""
        return packed_scores(self.places[2])


@attrs.frozen(eq=False)
class WantedLevel:
    """What the next level of a padded tree is to be made of: the best children that fit."""

    tree: TokenTree  # so far
    proposals: Proposals  # of the nodes of its last level
    expand: Tensor | bool  # bool [width], or True: which of these are expanded
    branch: Tensor | int  # int64 [width], or one number: children that each is wanted to have
    num_columns: int  # the most that `branch` can say
    least: float  # log-probability that a path must have
    max_nodes: int  # drafted nodes of the tree at most
    vocab_size: int  # token ids that the target knows
    fits: bool  # whether the level has a place for all children that there can be
    fits_budget: bool  # whether the tree has

    @property
    def cum_logprob(self) -> Tensor:
        """[width] float32: log-probabilities of the paths to the nodes."""
        return self.tree.cum_logprob[self.tree.last_level]


# what writes the columns of a level into a room, and what its nodes see of the places before
WriteLevel = Callable[[PaddedSpace, WantedLevel, Room, slice], None]


def write_plainly(space: PaddedSpace, wanted: WantedLevel, room: Room, level: slice) -> None:
    """Write a level by plain torch; nothing but its nodes' places among themselves is written elsewhere."""
    assert room.packed is not None, "a padded tree's room is packed"
    cum_logprob = wanted.cum_logprob
    if isinstance(wanted.expand, Tensor):
        cum_logprob = torch.where(wanted.expand, cum_logprob, space.impossible)
    proposed = space.laid_out(wanted, cum_logprob)
    is_admitted = proposed.scores[:-1, 1] >= wanted.least
    if isinstance(wanted.branch, Tensor):
        is_admitted &= (space.ranks < wanted.branch[:, None]).flatten()
    chosen = _chosen(space, wanted, proposed, is_admitted)
    torch.index_select(proposed.places, 1, chosen, out=room.packed[:4, level])
    old = level.start
    torch.index_select(room.mask[:, :old], 0, room.integers[1, level], out=room.mask[level, :old])


def _chosen(space: PaddedSpace, wanted: WantedLevel, proposed: _LevelRoom, is_admitted: Tensor) -> Tensor:
    """[width] int64: places of the best children that fit, ascending; behind them that of padding."""
    width, nothing = space.width, is_admitted.numel()
    if wanted.fits and wanted.fits_budget:
        return torch.nonzero_static(is_admitted, size=width, fill_value=nothing)[:, 0]
    # stable: of equals the first, as without padding
    of_paths = torch.where(is_admitted, proposed.scores[:-1, 1], space.impossible)
    values, places = of_paths.sort(descending=True, stable=True)
    is_chosen = values[:width] > -torch.inf
    if not wanted.fits_budget:
        is_chosen &= space.places[: is_chosen.numel()] < nodes_left(wanted.tree, wanted.max_nodes)
    chosen = torch.where(is_chosen, places[:width], proposed.last).sort().values
    num_missing = width - chosen.numel()
    return torch.nn.functional.pad(chosen, (0, num_missing), value=nothing) if num_missing else chosen


def nodes_left(tree: TokenTree, max_nodes: int) -> Tensor:
    """[] int64: drafted nodes that a padded tree may still have, of so many."""
    return max_nodes + 1 - tree.is_live.sum()


@attrs.frozen(eq=False)
class _Widths:
    """What a policy wants of the nodes of one level, as a tensor."""

    branch: Tensor  # [width] int64: children of each
    level: slice  # places of the nodes
    cum_logprob: Tensor  # [width] float32
    decider: str | None


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
        self._least = math.log(tau) if tau > 0 else LEAST_SCORE
        self._most = [1]  # nodes that each level has at most
        self.proposals: list[Proposals] = []  # of each level
        self._sent: list[int] = []  # levels of whose children the host will hear
        self._is_over = False
        self._widths: list[_Widths] = []  # where a policy answered with a tensor

    def root(self, token_id: Tensor) -> TokenTree:
        """The tree that holds only the last committed token [1] int64."""
        return TokenTree.padded_root(token_id, self.space.new_room())

    @property
    def is_over(self) -> bool:
        """Whether the host knows that a level is empty. It may know too late, which costs a pass and no node.

        The host is ahead of the device by a level at most: it would launch all levels behind an empty one otherwise.
        """
        heard = self.space.heard
        if heard is not None:
            if len(self._sent) > 1:
                heard.wait_for(self._sent[-2])
            self._is_over |= any(heard.number(level) == NO_NODE for level in self._sent)
        return self._is_over

    def _note(self, tree: TokenTree, first_score: Tensor) -> None:
        """Let the host hear of a tree's last level whether it is empty; the first levels hardly ever are.

        Args:
            tree: that has grown.
            first_score: [1] int64, both scores of the level's first place.
        """
        level = tree.max_depth - 1
        if first_score.device.type == "cpu":
            self._is_over = int(first_score) == NO_NODE
        elif self.space.heard is not None and FIRST_HEARD <= level < self.space.max_depth - 1:
            self.space.heard.send(level, first_score)
            self._sent.append(level)

    def nodes_left(self, tree: TokenTree) -> Tensor:
        """[] int64: drafted nodes that the budget still allows."""
        return nodes_left(tree, self.max_nodes)

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
        tree, space = frontier.tree, self.space
        num_columns = min(branch, space.max_branch) if isinstance(branch, int) else space.max_branch
        most = _most_admitted(self._most[-1] * num_columns, self._tau, max_width)
        fits_budget = sum(self._most[1:]) + most <= self.max_nodes
        self._most.append(min(most, space.width, self.max_nodes))
        wanted = WantedLevel(
            tree, frontier.proposals, expand, branch, num_columns, self._least, self.max_nodes, self.vocab_size,
            fits=most <= space.width, fits_budget=fits_budget,
        )  # fmt: skip
        if isinstance(branch, Tensor):
            self._widths.append(_Widths(branch, tree.last_level, frontier.cum_logprob, decider))
        self.proposals.append(frontier.proposals)
        grown = tree.grow_padded(space.width, lambda room, level: space.write(space, wanted, room, level))
        self._note(grown, grown.first_packed_score())
        return grown

    def most_rows(self, max_kept: int | None) -> int:
        """Rows that are enough for the tree's nodes, of which policies keep so many drafted ones at most."""
        most = min(self.max_nodes, sum(self._most[1:]))
        return 1 + (most if max_kept is None else min(most, max_kept))

    def checks(self, tree: TokenTree) -> list[Tensor]:
        """[1] int64 each: the least and the greatest token proposed, and the least and the greatest width that policies
        want of nodes that are there. Where a probability is no number, the least token is `NO_TOKEN`."""
        token_ids = torch.cat([one.token_ids for one in self.proposals])
        logprobs = torch.cat([one.logprobs for one in self.proposals])
        is_sound = (logprobs <= 1e-3) >= tree.is_live[: len(logprobs), None]  # or is of padding
        extremes = [*torch.where(is_sound, token_ids, self.space.no_token).aminmax()]
        if self._widths:
            are_all = len(self._widths) == len(self.proposals)
            live = [tree.is_live[: len(logprobs)]] if are_all else [tree.is_live[one.level] for one in self._widths]
            widths = torch.cat([one.branch for one in self._widths])
            extremes += (widths * (live[0] if len(live) == 1 else torch.cat(live))).aminmax()
        else:
            extremes += [self.space.depths[0]] * 2  # 0
        return [number[None] for number in extremes]

    def first_beyond(self, max_branch: int) -> str | None:
        """The policy that has first wanted a width out of range. The host waits for the device."""
        for wanted in self._widths:
            widths = wanted.branch * (wanted.cum_logprob > -torch.inf)
            if bool(((widths < 0) | (widths > max_branch)).any()):
                return wanted.decider
        return None


@attrs.frozen(eq=False)
class PaddedRows:
    """The nodes of a padded tree in the rows of one pass: those that are there first, padding behind them.

    A padding row has the root's position, and sees the text and padding. Nobody sees it.
    """

    _packed: Tensor = attrs.field(repr=False)  # [6, rows] int64: what is known of each; the parents of the padded tree
    parent: Tensor  # [rows] int64, -1 for the root
    ancestor_mask: Tensor  # [rows, rows] bool, row i marks node i and its ancestors
    draft_index: Tensor  # [rows] int64: places in the padded tree
    max_depth: int  # levels of the padded tree
    drafted: TokenTree  # the padded tree

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
        packed, mask = tree.gathered(order)
        parent = torch.searchsorted(order, packed[1])
        parent[:1].fill_(-1)
        return cls(packed, parent, mask, order, tree.max_depth, tree)

    @property
    def token_ids(self) -> Tensor:
        """[rows] int64; 0 for padding."""
        return self._packed[0]

    @property
    def depth(self) -> Tensor:
        """[rows] int64; 0 for padding."""
        return self._packed[4]

    @property
    def reach(self) -> Tensor:
        """[rows] int64: how far the path to each leads; less than the root for padding."""
        return self._packed[5]

    @property
    def num_nodes(self) -> int:
        """Rows, padding among them."""
        return self.draft_index.numel()

    @property
    def device(self) -> torch.device:
        return self.draft_index.device

    def copied(self) -> PaddedRows:
        """The same in memory of their own, as far as `tree` needs it: a graph writes into its own memory again."""
        return attrs.evolve(
            self,
            packed=self._packed.clone(),
            parent=self.parent.clone(),
            ancestor_mask=self.ancestor_mask.clone(),
            draft_index=self.draft_index.clone(),
        )

    def tree(self, level_sizes: Sequence[int]) -> TokenTree:
        """The tree without padding, by what the host has learnt of its levels. Its places are views of these."""
        nodes = slice(sum(level_sizes))
        logprob, cum_logprob = packed_scores(self._packed[2])[nodes].unbind(1)
        return TokenTree(
            token_ids=self.token_ids[nodes],
            parent=self.parent[nodes],
            logprob=logprob,
            cum_logprob=cum_logprob,
            ancestor_mask=self.ancestor_mask[nodes, nodes],
            level_sizes=tuple(size for size in level_sizes if size),
            cut=Cut(self.depth[nodes], self._packed[3, nodes], self.draft_index[nodes]),
        )
