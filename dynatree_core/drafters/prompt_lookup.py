"""The `prompt_lookup` drafter: continuations of earlier occurrences of the current suffix, merged into one tree.

Prompt lookup (Saxena 2023; in transformers since 4.37) copies one continuation as a chain. Here all occurrences
are followed at once: a node's children are the distinct next tokens of the occurrences that agree with the
path so far, weighted by how much of the suffix each occurrence matches. So the tree branches where the text went on in
different ways, and its probabilities come from counts, which lets every policy work on it.
"""

from __future__ import annotations

import functools

import attrs
import torch
from torch import Tensor

from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState, padded_proposals
from dynatree_core.plugins.params import count
from dynatree_core.plugins.spec import PluginSpec
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["PromptLookupDrafter"]

# An occurrence that matches n tokens has the weight n², and the case that no occurrence is right has 4. So one
# occurrence alone gives its next token the probability n² / (n² + 4): 0.2, 0.5, 0.69, 0.8 for n = 1…4. The weights of
# occurrences with the same next token are added up.
UNSEEN_WEIGHT = 4.0
# levels that are looked up together, since operators of tens of numbers cost the same for thousands; one by one where
# there are more matches than that
LOOK_AHEAD, MANY = 8, 128
# tokens of a text from which on comparing all its windows with the suffix takes a CPU longer than choosing some first
LONG = 2048
DRAFTED_EVIDENCE = 0.5  # tokens by which a drafted one lengthens a match: less than 1, since it is not confirmed yet


@attrs.frozen(slots=False)
class PromptLookupDrafter(Drafter):
    """Drafts from the prompt and the output so far; needs no model and costs no forward pass.

    Args:
        max_ngram: longest suffix that is compared, in tokens.
        max_matches: occurrences that are followed; the longest matches first, the latest among equals.
    """

    max_ngram: int = count(8)
    max_matches: int = count(16)

    def __str__(self) -> str:
        changed = {name: value for name, value in attrs.asdict(self).items() if value != getattr(DEFAULTS, name)}
        return str(PluginSpec("prompt_lookup", None, changed))

    def start(self, plan: DraftPlan) -> PromptLookupState:
        return PromptLookupState(self)


DEFAULTS = PromptLookupDrafter()


class PromptLookupState(DraftState):
    """The occurrences that one iteration follows."""

    is_capturable = True  # padding follows what agrees with it, by itself

    def __init__(self, drafter: PromptLookupDrafter) -> None:
        self.drafter = drafter
        self.of_any: Proposals | None = None  # [levels, 1 + matches, k], see `followed_by_any`

    def prefill(self, committed_ids: Tensor) -> None:
        pass  # `propose` is given the whole text each time

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        if tree.max_depth == 0:
            self._find_matches(committed_ids)
        if self.ends.numel() == 0:  # a text of one token has nothing earlier
            nothing = committed_ids.new_zeros(tree.level_sizes[-1], 0)
            return padded_proposals(nothing, nothing.float(), k)
        if tree.max_depth > 0:
            self._follow(tree)
        ahead = tree.max_depth % self.num_ahead
        if ahead == 0:
            self._look_ahead(committed_ids, tree.max_depth)
        self.next_ids = self.ahead_ids[ahead]  # [matches]
        if not self.has_tables:
            return _vote(self.followed, self.next_ids, self.spokesmen[ahead], self.weights[ahead], k)
        if self.of_any is None or self.of_any.token_ids.shape[-1] != k:  # what is proposed in any of these levels
            each = self.ahead_ids[:, None], self.spokesmen[:, None], self.weights[:, None]
            self.of_any = _vote(self.followed_by_any, *each, k)
        # whoever is followed last stands for all that are: they have the same tokens so far
        rows = self.followed.amax(dim=1)
        token_ids, logprobs = self.of_any.token_ids[ahead], self.of_any.logprobs[ahead]
        return Proposals(token_ids.index_select(0, rows), logprobs.index_select(0, rows))

    def bounds_of_rest(self, depth: int, k: int, rest_of_root: float, *, is_own: bool) -> tuple[float, float]:
        """Where nothing is found at the root, nothing goes on below; a node of its own is the next token of one at
        least, whose match is `depth` drafted tokens longer by then."""
        if rest_of_root == 1:
            return 1.0, 1.0
        if not is_own or k < self.ends.numel():  # not all that is found has a place among the k best
            return 0.0, 1.0
        return 0.0, UNSEEN_WEIGHT / ((1 + DRAFTED_EVIDENCE * depth) ** 2 + UNSEEN_WEIGHT)

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass  # the next `propose` searches again, since the suffix has changed

    def rollback(self) -> None:
        pass

    def _find_matches(self, ids: Tensor) -> None:
        """The best occurrences of the suffix: where each ends, and how many tokens of the suffix it matches."""
        earlier = ids.numel() - 1  # an occurrence ends at any token but the last
        n = max(min(self.drafter.max_ngram, earlier), 1)
        padded = torch.nn.functional.pad(ids, (n - 1, 0), value=-1)
        windows = padded.unfold(0, n, 1)[:-1]  # [earlier, n]: the n tokens that end at each place
        if ids.device.type == "cpu" and earlier >= LONG:
            places = (ids[:-1] == ids[-1]).nonzero()[:, 0]  # of few tokens, for which a GPU would be waited for
            lengths = torch.zeros_like(ids[:-1]).index_copy_(0, places, _matched(windows[places], ids[-n:]))
        else:
            lengths = _matched(windows, ids[-n:])
        order = torch.arange(earlier, device=ids.device).add_(lengths, alpha=earlier)
        self.ends = order.topk(min(self.drafter.max_matches, earlier)).indices  # [matches]
        self.lengths = lengths[self.ends].float()  # [matches]
        self.num_ahead = LOOK_AHEAD if self.ends.numel() <= MANY else 1
        # a continuation that reaches the end of the text is read again from its beginning: the text is taken for a
        # loop, whose period is the distance between the occurrence and the suffix
        self.begins, self.periods = self.ends + 1, (earlier - self.ends).clamp(min=1)  # [matches]
        self.has_tables = self.num_ahead > 1 and tabulates(ids.device)
        self.followed = (self.lengths > 0)[None]  # [width, matches]: which occurrences agree with a node's path
        if self.has_tables:  # by their numbers, from 1 on
            self.followed = self.followed * _numbers(self.ends.numel(), ids.device)

    def _follow(self, tree: TokenTree) -> None:
        """Move from the parents to the frontier: keep the occurrences whose next token is the node's."""
        level = tree.last_level
        first_parent = level.start - tree.level_sizes[-2]
        parents = tree.parent[level] - first_parent
        self.followed = self.followed[parents] * (self.next_ids == tree.token_ids[level][:, None])

    def _look_ahead(self, ids: Tensor, depth: int) -> None:
        """What each occurrence's continuation has after `depth` tokens and more, for several levels at once."""
        depths = _numbers(self.num_ahead, ids.device) + (depth - 1)
        self.ahead_ids = ids[self.begins + depths[:, None] % self.periods]  # [levels, matches]
        self.weights = self.lengths.add(depths[:, None], alpha=DRAFTED_EVIDENCE).square()  # [levels, matches]
        # all occurrences with the same next token add their weights to the first one of them
        is_same = (self.ahead_ids[:, :, None] == self.ahead_ids[:, None]).view(torch.uint8)
        self.spokesmen = is_same.argmax(dim=2)  # [levels, matches]
        if not self.has_tables:
            return
        if depth == 0:  # all that was found agrees so far
            self.agree = (self.followed > 0).view(torch.uint8).expand(is_same.shape[1:])
        agree = torch.cat([self.agree[None], is_same]).cumprod(dim=0, dtype=torch.uint8)
        # [levels, 1 + matches, matches] 1 or 0: what a node follows for which an occurrence stands, and one without any
        self.followed_by_any = torch.nn.functional.pad(agree[:-1], (0, 0, 1, 0))
        self.agree, self.of_any = agree[-1], None


def _vote(is_followed: Tensor, next_ids: Tensor, spokesmen: Tensor, weights: Tensor, k: int) -> Proposals:
    """Distinct next tokens by the weight of the occurrences behind them.

    Args:
        is_followed: [nodes, matches] bool, or [levels, nodes, matches] 1 or 0.
        next_ids: [matches] or [levels, 1, matches]: the token that each has next.
        spokesmen: likewise, the first that has the same one.
        weights: likewise, float32.
        k: children of each node.
    """
    weights = is_followed * weights
    votes = torch.zeros_like(weights).scatter_add_(-1, spokesmen.expand_as(weights), weights)
    probs = votes / (weights.sum(dim=-1, keepdim=True) + UNSEEN_WEIGHT)
    top = probs.topk(min(k, weights.shape[-1]), dim=-1)
    return padded_proposals(next_ids.expand_as(weights).gather(-1, top.indices), top.values.log(), k)


def tabulates(device: torch.device) -> bool:
    """Whether what follows any occurrence is found at once for all levels that are looked up.

    That leaves seven kernels for a level in place of fifteen. A CPU is quicker level by level, for trees of few levels.
    """
    return device.type != "cpu"


@functools.cache
def _numbers(number: int, device: torch.device) -> Tensor:
    """[number] int64: 1, 2, 3, …; nobody may write into it."""
    with torch.inference_mode(False):
        return torch.arange(1, number + 1, device=device)


def _matched(windows: Tensor, suffix: Tensor) -> Tensor:
    """[places] int64: tokens of the suffix [n] that windows [places, n] match, from the right as long as each does."""
    return (windows == suffix).flip(1).cumprod(dim=1).sum(dim=1)
