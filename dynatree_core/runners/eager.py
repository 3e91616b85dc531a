"""The `eager` runner: calls a transformers model as it is, through its public forward. The oracle for the others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from transformers import Cache

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.errors import ForwardPassError
from dynatree_core.models.architectures import (
    AttentionLayout,
    attention_layout,
    cache_argument,
    forward_parameters,
    max_positions,
    num_embeddings,
)
from dynatree_core.models.placement import check_same_pass
from dynatree_core.models.state import without_gradients
from dynatree_core.runners.agreement import TOLERANCE, apart
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner, kept_copy
from dynatree_core.runners.together import padded, ragged
from dynatree_core.tree.flatten import FlatTrees, flatten, flatten_chain
from dynatree_core.tree.token_tree import TokenTree

if TYPE_CHECKING:
    from dynatree_core.runners.folded import Folded

__all__ = ["EagerRunner"]

NUM_COMPARED = 13  # rows by which folded attention is compared with a model's own: eight tokens and a tree behind them


@final
class EagerRunner(Runner):
    """Calls a model.

    Args:
        model: it is not changed.
        layout: how it wants its masks; None: as its configuration says.

    Raises:
        UnsupportedModelError: the model's attention takes no tree mask.
    """

    name = "eager"

    def __init__(self, model: nn.Module, layout: AttentionLayout | None = None) -> None:
        self.model = model
        self._layout = layout or attention_layout(model)
        self._dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        self.num_layers = int(getattr(model.config, "num_hidden_layers", 1))
        # whether the head can be told to compute the last rows only, which saves most of a prefill's memory
        parameters = forward_parameters(model)
        self._can_skip_logits = "logits_to_keep" in parameters
        self._cache_argument = cache_argument(model)
        # a mixture of experts may be configured to compute its training loss, which does not take a 4-D mask
        self._fixed_arguments = {"output_router_logits": False} if "output_router_logits" in parameters else {}

    @classmethod
    def preference(cls, model: nn.Module, kept: Kept) -> int:
        return 1

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> EagerRunner:
        """The runner of a model; on CUDA that of `with_folded_attention`."""
        device: torch.device = model.device  # type: ignore[assignment]
        return cls.with_folded_attention(model, kept) if device.type == "cuda" else cls(model)

    @classmethod
    def with_folded_attention(cls, model: nn.Module, kept: Kept) -> EagerRunner:
        """A runner with folded attention where the model can have it, and else with the model's own.

        Args:
            model: it is not changed.
            kept: what earlier generations have left, as for `make`.
        """
        # it imports transformers' modelling code, for which a command with the embedded model would wait
        from dynatree_core.runners.folded import ATTENTION, reason_against_folding

        limit = max_positions(model)
        if reason_against_folding(model) is not None or (limit is not None and limit < NUM_COMPARED):
            return cls(model)
        found: Folded | None = kept_copy(ATTENTION, kept, model, lambda: _compared(model))
        return cls(model) if found is None else cls(found.model, found.layout)

    def forward(
        self,
        flat: FlatTrees,
        cache: KeyValueCache | Cache,
        *,
        hidden: bool = False,
        last_row_only: bool = False,
        is_prompt: bool = False,
    ) -> PassOutput:
        """One pass, as `Runner.forward`.

        Raises:
            ForwardPassError: logits are missing for some rows, or hidden states cannot be had.
        """
        told = flat.position_ids if flat.model_positions is None else flat.model_positions
        masks = self._layout.masks(flat, self._dtype)
        return self._called(flat.token_ids, told, masks, cache, hidden=hidden, last_row_only=last_row_only)

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False, is_ragged: bool = False
    ) -> list[PassOutput]:
        """One pass over the rows of several sequences, as `Runner.forward_together`.

        Args:
            parts: two at least.
            hidden: as for `forward`.
            last_row_only: only the logits of each sequence's last row are wanted.
            is_ragged: whether the model's attention asks `ragged_lanes`; otherwise rows and slots are padded.
        """
        joined = (ragged if is_ragged else padded)(parts, self._layout, self._dtype)
        output = self._called(joined.token_ids, joined.position_ids, joined.masks, joined.cache, hidden=hidden)
        joined.check()
        return joined.split(output, last_row_only=last_row_only)

    def _called(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        masks: Any,
        cache: KeyValueCache | Cache,
        *,
        hidden: bool,
        last_row_only: bool = False,
    ) -> PassOutput:
        """Call the model; the tensors are [lanes, rows]."""
        check_same_pass(self.model, token_ids, position_ids)
        arguments: dict[str, object] = {
            "input_ids": token_ids,
            "attention_mask": masks,
            "position_ids": position_ids,
            self._cache_argument: cache,
            "use_cache": True,
            **self._fixed_arguments,
        }
        if hidden:
            head = _ListeningHead(self.model, last_row_only)
            logits: Tensor = head.model(**arguments).logits
            if head.heard is None or head.heard.shape[:2] != token_ids.shape:
                raise ForwardPassError(
                    f"hidden states are what goes into a model's head, got a pass of {type(self.model).__name__} "
                    "that does not call its head with all rows; take off what has replaced its forward"
                )
            output = PassOutput(logits, head.heard)
        else:
            if last_row_only and self._can_skip_logits:
                arguments["logits_to_keep"] = 1
            output = PassOutput(self.model(**arguments).logits)
        if last_row_only:
            return PassOutput(output.logits[:, -1:], output.hidden)
        if output.logits.shape[1] != token_ids.shape[1]:
            raise ForwardPassError(
                f"a model must give logits for each of a pass's {token_ids.shape[1]} rows, got "
                f"{output.logits.shape[1]}; take off the model what drops the others"
            )
        return output


def _compared(model: nn.Module) -> Folded | None:
    """A model with folded attention that says what the model says; None, with a warning, where it does not."""
    from dynatree_core.runners.folded import folded

    made = folded(model)
    if made is None:
        return None
    own = EagerRunner(model)
    failure = None
    with without_gradients(model):
        expected = _of_a_small_tree(own, model)
        try:
            found = _of_a_small_tree(EagerRunner(made.model, made.layout), model)
        except (RuntimeError, ForwardPassError) as error:  # so torch and ours say what a kernel does not take
            failure = f"{type(error).__name__}: {error}"
        else:
            off = float(torch.stack([apart(*pair) for pair in zip(found, expected, strict=True)]).amax())
            if not off <= TOLERANCE[own._dtype]:  # NaN is not either
                failure = f"a pass over a small tree was off by {off:.2g} of the largest number"
    if failure is None:
        return made
    warnings.warn(
        f"folded attention cannot take the place of the model's own, so passes are slower than they could be ({failure}"
        "); load the model with attn_implementation='eager'",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _of_a_small_tree(runner: EagerRunner, model: nn.Module) -> list[Tensor]:
    """Logits, keys and values of two children and two grandchildren of a root behind a few tokens."""
    device: torch.device = model.device  # type: ignore[assignment]
    token_ids = torch.arange(NUM_COMPARED, device=device) % num_embeddings(model)
    prefix, root, children, grandchildren = torch.split_with_sizes(token_ids, [NUM_COMPARED - 5, 1, 2, 2])
    first, second = torch.zeros_like(children), 1 + torch.arange(2, device=device)  # parents
    logprob = torch.zeros(2, device=device)
    tree = TokenTree.root(root).grow(first, children, logprob).grow(second, grandchildren, logprob)
    cache = TreeCache(NUM_COMPARED)
    logits = [runner.forward(cache.prepare(flatten_chain(prefix, 0)), cache).logits]
    cache.commit([range(cache.block_len)])
    logits.append(runner.forward(cache.prepare(flatten([tree], [cache.length])), cache).logits)
    return [*logits, *cache.keys, *cache.values]


class _ListeningHead(nn.Module):
    """A model's head that keeps what goes into it, in a second module object with the same parts, for one pass.

    transformers' own `output_hidden_states` would put hooks on the model that stay, and hooks of ours would be seen by
    passes of other threads.

    Attributes:
        model: the second object.
        heard: [lanes, rows, hidden], or None where the head was not called.
    """

    def __init__(self, model: nn.Module, last_row_only: bool) -> None:
        super().__init__()
        self.heard: Tensor | None = None
        self._last_row_only = last_row_only
        self._head = [model.get_output_embeddings()]  # type: ignore[operator]  # in a list: it is no part of this one
        twin: Any = copy.copy(model)
        own = [name for name, part in model.named_children() if part is self._head[0]]
        twin._modules = {**model._modules, **dict.fromkeys(own, self)}
        self._twin = [twin]

    @property
    def model(self) -> nn.Module:
        twin: nn.Module = self._twin[0]
        return twin

    def forward(self, rows: Tensor) -> Tensor:
        self.heard = rows
        logits: Tensor = self._head[0](rows[:, -1:] if self._last_row_only else rows)
        return logits

    def __getattr__(self, name: str) -> Any:  # what a forward reads of its head, such as the weight's dtype
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_head"][0], name)
