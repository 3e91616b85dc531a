"""Proposals for one level of several trees, computed together when the first policy looks at its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack

from dynatree_core.drafters.base import proposing_of
from dynatree_core.engine.faults import Faults
from dynatree_core.engine.lane import Lane
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.passes import AskedPass, computed
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["SharedProposals"]

Steps = Generator[AskedPass, PassOutput, Proposals]


class SharedProposals:
    """What the drafter proposes for the last levels of several trees.

    Args:
        trees: of all that may still grow.
    """

    def __init__(self, trees: Mapping[Lane, TokenTree]) -> None:
        self._undecided = dict(trees)
        self._proposals: dict[Lane, Proposals] = {}
        self._faults = Faults()

    def of(self, lane: Lane) -> Proposals:
        """For one of them. The first who asks has the passes made for all who are likely to ask, too.

        Those have asked for the level before, or in their last iteration. A drafter's model follows no other's text.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        lane.note_asked()
        if lane in self._undecided:
            self._compute()
        if lane in self._faults.errors:
            raise self._faults.errors[lane]
        return self._proposals[lane]

    def is_look_free(self, lane: Lane) -> bool:
        """Whether what `of` says takes no pass of a model. Nobody else's proposals are made for that.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        if lane in self._proposals:
            return self._proposals[lane].is_free
        tree = self._undecided.get(lane)
        if tree is None:  # it has failed, or its tree has ended
            return False
        assert lane.draft_state is not None, "a lane without a drafter has no level to look at"
        with lane.clock.measure("draft", on_device=True), lane.blame_drafter():
            return lane.draft_state.is_look_free(lane.tree_ids, tree, lane.sequence.limits.max_branch)

    def leave(self, lane: Lane) -> None:
        """Its tree ends here, whether it has asked or not.

        Raises:
            DrafterError: its drafter has failed while others asked.
        """
        self._undecided.pop(lane, None)
        if lane in self._faults.errors:
            raise self._faults.errors[lane]

    def _compute(self) -> None:
        trees = {lane: tree for lane, tree in self._undecided.items() if lane.is_likely_to_ask}
        self._undecided = {lane: tree for lane, tree in self._undecided.items() if lane not in trees}
        with ExitStack() as clocks:
            for lane in trees:
                # by the device's time where there is one, as the passes in it are: the host may run ahead of both
                clocks.enter_context(lane.clock.measure("draft", on_device=True))
            running = self._faults.each(_steps, trees)
            asked = {lane: wanted for lane in trees if lane in running and (wanted := self._advanced(lane, running))}
            while asked:  # who wants passes one after the other has each made together with those of others
                outputs = dict(zip(asked, computed([*asked.values()]), strict=True))
                asked = {lane: wanted for lane in asked if (wanted := self._advanced(lane, running, outputs[lane]))}
        for lane in [lane for lane in trees if lane in self._proposals]:
            with self._faults.of(lane):
                lane.check_proposals(self._proposals[lane], trees[lane])

    def _advanced(
        self, lane: Lane, running: Mapping[Lane, Steps], output: PassOutput | Exception | None = None
    ) -> AskedPass | None:
        """The next pass that a lane's drafter wants; None where it has answered or failed."""
        steps = running[lane]
        with self._faults.of(lane), lane.blame_drafter():
            try:
                if output is None:
                    return next(steps)
                return steps.throw(output) if isinstance(output, Exception) else steps.send(output)
            except StopIteration as done:
                self._proposals[lane] = done.value
        return None


def _steps(lane: Lane, tree: TokenTree) -> Steps:
    assert lane.draft_state is not None, "a lane without a drafter never asks for proposals"
    with lane.blame_drafter():
        return proposing_of(lane.draft_state, lane.tree_ids, tree, lane.sequence.limits.max_branch)
