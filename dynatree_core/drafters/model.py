"""The `model` drafter: a small causal language model with the target's vocabulary (Leviathan et al. 2023,
Chen et al. 2023), expanding a whole tree level in one forward pass.

It follows the text only when it is asked. The committed tokens that it has not seen, at first the whole prompt, go
through it together with the next tree's root: one or two tokens where it is asked in every iteration, more after
iterations in which nobody asked. Rows of accepted nodes stay in its cache, so no token goes through it twice, unless
the target's cache is bounded.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, cast

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState, by_itself, padded_proposals
from dynatree_core.errors import ParameterError, VocabularyMismatchError
from dynatree_core.models.architectures import num_embeddings, vocab_size
from dynatree_core.models.load import load_model
from dynatree_core.models.stored import StoredTable
from dynatree_core.models.student import RestrictedHead
from dynatree_core.models.wrappers import plain_model
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.passes import PREFILL_CHUNK, AskedPass, Passes
from dynatree_core.tree.flatten import FlatTrees, flatten_chain, flatten_level
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

if TYPE_CHECKING:  # what records graphs is no part of a start on the CPU
    from dynatree_core.runners.behind import PassesBehind, RowsBehind

__all__ = ["ModelDraftState", "ModelDrafter"]

# heads are padded to multiples of up to this many ids (Pythia 50,254 tokens: 50,304 to 50,688 outputs)
MAX_VOCAB_PADDING = 512


class ModelDrafter(Drafter):
    """Drafts with a transformers causal language model.

    Args:
        model: the model, or the hub id or folder to load it from (`drafter="model(model='...')"`).
    """

    def __init__(self, model: nn.Module | str) -> None:
        if isinstance(model, str):
            model = load_model(model).model
        if not isinstance(model, nn.Module):
            raise ParameterError(f"the model drafter's model must be a model, a folder or a hub id, got {model!r}")
        self.model = plain_model(model, "drafter")

    def __str__(self) -> str:
        name = getattr(self.model.config, "name_or_path", "")
        return f"model(model={name!r})" if name else f"model({type(self.model).__name__})"

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        return (self.model,)

    def price_class(self) -> str:
        return "model"

    def start(self, plan: DraftPlan) -> ModelDraftState:
        return ModelDraftState(self.model, plan)


class ModelDraftState(DraftState):
    """One generation that a transformers causal language model drafts for, with a cache of its own.

    A drafter with such a model makes one in its `start`, and returns the model from its `models`. Following the text
    when it is asked, reuse of prefixes, skipped levels and runners come with it.

    Where the target's cache is bounded, so is this one: it follows the same first tokens and the last ones, which it
    puts at consecutive positions. When they outgrow the bound it begins anew with half a window. That suits any model,
    and what it costs is a second look at each token; only a target's output has to be exact.

    Args:
        model: the model, on the plan's device, in eval mode.
        plan: the generation's, as `Drafter.start` was given it.

    Raises:
        VocabularyMismatchError: the model's head is not one for the target's token ids.
        ParameterError: the model is on the meta device.
    """

    # skipped levels are run together with the next requested level, or after the commit
    can_skip_levels = True
    is_capturable = True  # padding is a row like any other, which sees what its parent sees

    def __init__(self, model: nn.Module, plan: DraftPlan) -> None:
        if plan.device.type == "meta":
            raise ParameterError("the drafter must be on a device that computes, got meta; load its weights")
        if restricted_ids(model) is None:
            check_vocabularies(plan.vocab_size, vocab_size(model))
        runner = plan.make_runner(model, plan.runner)
        self.passes = Passes(runner, plan.clock)
        self.num_slots = plan.num_followed + plan.max_nodes  # for the whole text with its last tree
        self.max_nodes = plan.max_nodes
        self.budget = plan.budget
        self.row_bytes = 0 if self.budget is None else self.budget.row_bytes(model, runner)
        if self.budget is None:
            self.cache = plan.new_cache(runner, self.num_slots, self)
        else:
            small = runner.new_cache(min(1, self.num_slots))
            self.cache = small if small.can_grow else runner.new_cache(self.num_slots)
        self.prefix = plan.prefix if self.cache.has_all_rows else None
        if self.prefix is not None:
            self.prefix.add(model, self.cache)
        self.kept = plan.kept
        self.num_skipped = 0  # tokens behind the first ones that are no longer followed
        self.token_of = restricted_ids(model)  # [outputs] the token that each output says; None: they are the ids
        # outputs that say a token which the target knows
        self.num_outputs = vocab_size(model) if self.token_of is not None else min(plan.vocab_size, vocab_size(model))
        self.last_id = num_embeddings(model) - 1
        self.knows_all_ids = plan.vocab_size <= num_embeddings(model)
        self.num_settled = 0  # cache rows of earlier iterations: where a rollback goes back to

    def prefill(self, committed_ids: Tensor) -> None:
        """Copy what the prefix cache knows of the text. The rest waits until somebody asks (`num_behind`)."""
        if self.prefix is not None:
            self._make_room(committed_ids.numel())
            # by the target's ids: of any two texts with the same, this model has the same rows
            self.prefix.fill(self.cache, committed_ids)
        self.num_settled = self.cache.length

    def num_behind(self, num_committed: int) -> int:
        num_followed = num_committed - self._num_to_skip(num_committed)
        num_known = self.cache.length if num_followed == num_committed - self.num_skipped else 0
        return max(num_followed - num_known - 1, 0)

    def num_bytes(self, num_committed: int | None = None) -> int:
        if num_committed is None or self.budget is None:
            return self.cache.num_bytes
        return max(self._num_slots_for(num_committed), self.cache.capacity) * self.row_bytes

    def _num_slots_for(self, num_committed: int) -> int:
        """Slots for so many tokens and a tree, in blocks."""
        assert self.budget is not None, "without a budget there are slots for the whole text"
        return min(self.budget.in_blocks(num_committed + self.max_nodes), self.num_slots)

    def _make_room(self, num_committed: int) -> None:
        if self.budget is not None and self.cache.can_grow:
            self.cache.grow(self._num_slots_for(num_committed))

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        return by_itself(self.proposing(committed_ids, tree, k))

    def proposing(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Generator[AskedPass, PassOutput, Proposals]:
        followed = self._followed(committed_ids)
        is_behind = self.cache.length < followed.numel()  # false once the root has been proposed for
        assert is_behind or tree.max_depth > 0, "propose is called for the root once an iteration at most"
        if is_behind:
            self._make_room(committed_ids.numel())
            while followed.numel() - self.cache.length > PREFILL_CHUNK:  # a long prompt, or it begins anew
                chunk = followed[self.cache.length :][:PREFILL_CHUNK]
                yield self._asked(flatten_chain(chunk, self.cache.length), last_row_only=True)
                self.cache.commit([range(chunk.numel())])
                self.num_settled = self.cache.length
            self.num_settled = self.cache.length
            pending = flatten_chain(followed[self.num_settled :], self.num_settled)
            output = yield self._asked(pending, last_row_only=True)
            logits = output.logits[0]  # [1, outputs]
            self.cache.commit([range(self.cache.block_len)])
            self.num_settled = self.cache.length - 1  # whatever becomes of the tree, but its root is asked about again
        if tree.max_depth > 0:
            output = yield self._asked(flatten_level(tree, self.cache.length, self.cache.block_len))
            logits = output.logits[0][-tree.level_sizes[-1] :]
        proposals = top_proposals(logits[:, : self.num_outputs], k)
        if self.token_of is None:
            return proposals
        return attrs.evolve(proposals, token_ids=self.token_of[proposals.token_ids])

    def _asked(self, flat: FlatTrees, *, last_row_only: bool = False) -> AskedPass:
        if not self.knows_all_ids:
            flat = attrs.evolve(flat, token_ids=self._own(flat.token_ids))
        return AskedPass(self.passes, flat, self.cache, "draft_forward", last_row_only)

    def behind(self, passes: PassesBehind, rows: RowsBehind) -> ModelDraftState:
        """A state to record what this one drafts: the text that it is shown is what this one has not followed yet."""
        state = copy.copy(self)
        state.passes, state.cache = cast("Passes", passes), cast("KeyValueCache", rows)
        state.prefix, state.budget, state.num_settled = None, None, 0
        return state

    def note_replayed(self, num_followed: int, num_rows: int) -> None:
        """Count what a replay has written: tokens that are followed from now on, and rows of a tree behind them."""
        self.cache.append(num_followed)
        self.cache.commit([range(num_followed)])
        self.num_settled = self.cache.length - 1  # as in `proposing`
        self.cache.append(num_rows)

    def commit(self, draft_path: tuple[int, ...]) -> None:
        # node i stands in block row i − 1, the root being committed; the deepest nodes may not have been forwarded
        self.cache.commit([[node - 1 for node in draft_path if node <= self.cache.block_len]])
        self.num_settled = self.cache.length

    def rollback(self) -> None:
        self.cache.truncate(self.num_settled)

    def runners(self) -> Sequence[Passes]:
        return (self.passes,)

    def _followed(self, committed_ids: Tensor) -> Tensor:
        """The tokens that are in the cache or go there next; empties the cache where too many have to leave it."""
        if self.kept is None:
            return committed_ids
        num_skipped = self._num_to_skip(committed_ids.numel())
        if num_skipped != self.num_skipped:
            self.cache.truncate(0)
            self.num_skipped = num_skipped
        sinks = self.kept.sinks
        return torch.cat([committed_ids[:sinks], committed_ids[sinks + num_skipped :]])

    def _num_to_skip(self, num_committed: int) -> int:
        """Tokens behind the first ones that are not followed, of a text of so many: half a window is, after a cut."""
        if self.kept is None or num_committed - self.num_skipped <= self.kept.num_tokens:
            return self.num_skipped
        return num_committed - self.kept.sinks - (self.kept.window + 1) // 2

    def _own(self, token_ids: Tensor) -> Tensor:
        """Ids that this drafter can embed: padding ids of the target beyond its table become its last id."""
        return token_ids if self.knows_all_ids else token_ids.clamp(max=self.last_id)


def restricted_ids(model: nn.Module) -> Tensor | None:
    """[outputs] the tokens of a head that says some tokens only, None for a head that says all."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head.token_ids if isinstance(head, RestrictedHead | StoredTable) else None


def check_vocabularies(target_size: int, drafter_size: int) -> None:
    """Refuse sizes that differ by more than the padding of a head.

    A wrong vocabulary could not make the output wrong, only every draft useless.

    Raises:
        VocabularyMismatchError: naming both sizes.
    """
    difference, larger = abs(target_size - drafter_size), max(target_size, drafter_size)
    if difference >= MAX_VOCAB_PADDING or difference > 0.02 * larger:
        raise VocabularyMismatchError(
            f"the drafter must have the target's vocabulary, up to padding of the head: the target has {target_size} "
            f"token ids, the drafter {drafter_size}; choose a drafter of the same model family"
        )


def top_proposals(logits: Tensor, k: int) -> Proposals:
    """The k best children from a drafter's logits [width, vocab]; -inf where the vocabulary is smaller than k."""
    top = logits.float().log_softmax(dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    return padded_proposals(top.indices, top.values, k)
