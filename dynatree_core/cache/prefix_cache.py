"""The prefix cache: rows of earlier generations, for prompts that begin as those did, such as the turns of a chat.

Rows are copied, into the prefix cache when a generation ends and out of it when one begins. So no buffer ever has two
owners: a session that goes on, fails or runs in another thread cannot disturb another one, and what is kept has no
room in it for tokens to come. A copy costs little beside the prefill that it saves (docs/chat.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Sequence

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.errors import ParameterError
from dynatree_core.models.placement import computing_device
from dynatree_core.models.state import state_of
from dynatree_core.plugins.params import as_python

__all__ = ["PrefixCache", "PrefixReuse", "RunningRows"]

DEFAULT_MAX_BYTES = 2**30


@attrs.frozen(eq=False)
class _Entry:
    """The rows of one text in one model. Never changed, so that it may be read while others come and go."""

    model: weakref.ref[nn.Module]  # a prefix cache keeps no model alive
    made_as: Hashable  # see _way_of
    token_ids: Tensor  # [rows] int64, on the CPU
    keys: tuple[Tensor, ...]  # per layer, [1, heads, rows, head_dim]
    values: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """What its buffers take up."""
        return sum(buffer.untyped_storage().nbytes() for buffer in (self.token_ids, *self.keys, *self.values))

    def num_common(self, token_ids: Tensor) -> int:
        """Tokens that both texts begin with."""
        return _num_common(self.token_ids, token_ids)


class PrefixCache:
    """Keeps the keys and values of generations for later prompts that begin with the same tokens.

    Give one to several generations as `prefix_cache=`: what a prompt has in common with the prompt and output of an
    earlier one is copied instead of computed, for the target and for a model as drafter. The most recently used texts
    stay, as many as fit; a text that another one continues is not kept twice. Sessions of several threads may share
    it.

    Rows belong to a model object as it was: device, dtype, attention, adapters, hooks and the variables that these
    read, attributes of its modules, and changes of weights that torch counts are compared, and the numbers of adapters.
    Call `clear` after changing other weights through `.data`, or what a hook reads from a file or a library. What a
    hook reads is not looked at where it also keeps what it sees, such as a count of its calls.

    Args:
        max_bytes: what all kept buffers may take up together. A generation that is larger is not kept.

    Raises:
        ParameterError: `max_bytes` is not an integer of at least 0.
    """

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        max_bytes = as_python(max_bytes)
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ParameterError(f"max_bytes must be an integer of at least 0, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the most recently used one last
        # one thread may come here twice: garbage collection may end a generation at any point
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<PrefixCache: {len(self._entries)} texts, {self.num_bytes} of {self.max_bytes} bytes>"

    @property
    def num_bytes(self) -> int:
        """What the kept buffers take up."""
        return sum(entry.num_bytes for entry in self._entries)

    def shrink(self, max_bytes: int) -> None:
        """Forget texts, those that were not used for longest first, until all take up no more than so many bytes."""
        with self._lock:
            entries = self._entries
            while entries and sum(entry.num_bytes for entry in entries) > max_bytes:
                entries = entries[1:]
            self._entries = entries

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries = []

    def num_known(self, model: nn.Module, token_ids: Tensor, *, is_drafter: bool = False) -> int:
        """How many rows `take` would copy."""
        text = token_ids.cpu()
        with self._lock:
            return max((entry.num_common(text) for entry in self._of(model, is_drafter)), default=0)

    def take(self, model: nn.Module, token_ids: Tensor, cache: KeyValueCache, *, is_drafter: bool = False) -> int:
        """Copy what is known of a text's first tokens into a cache that is still empty.

        Args:
            model: whose cache it is.
            token_ids: [tokens] int64, the text.
            cache: with one lane and all rows.
            is_drafter: whether the rows are for drafts alone, which may be wrong: what hooks read is not looked at.

        Returns:
            How many rows the cache has now.
        """
        text = token_ids.cpu()
        with self._lock:
            alike = self._of(model, is_drafter)
            best = max(alike, key=lambda entry: entry.num_common(text), default=None)
            num_common = best.num_common(text) if best is not None else 0
            if best is None or num_common == 0:
                return 0
            self._entries = [*(entry for entry in self._entries if entry is not best), best]
        cache.load(best.keys, best.values, num_common)
        return num_common

    @torch.inference_mode()
    def keep(
        self,
        model: nn.Module,
        token_ids: Tensor,
        cache: KeyValueCache,
        *,
        is_drafter: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        """Keep a copy of a cache's committed rows, if they fit.

        Args:
            model: whose cache it is.
            token_ids: [at least as many as there are rows] int64, the text.
            cache: with one lane and all rows.
            is_drafter: as for `take`.
            max_bytes: what all may take up, where that is less than usual.
        """
        most = self.max_bytes if max_bytes is None else min(max_bytes, self.max_bytes)
        text = token_ids[: cache.length].to("cpu", copy=True)
        num_bytes = cache.length * (cache.row_bytes + text.element_size())
        if not 0 < num_bytes <= most:
            return
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.model() is not None]
            alike = self._of(model, is_drafter)
            longer = [entry for entry in alike if entry.num_common(text) == text.numel()]
            shorter = [entry for entry in alike if entry.num_common(text) == entry.token_ids.numel()]
            gone = longer[-1:] or shorter
            entries = [entry for entry in self._entries if entry not in gone]
            if longer:
                self._entries = [*entries, *gone]
                return
            while sum(entry.num_bytes for entry in entries) + num_bytes > most:
                del entries[0]
            self._entries = entries  # before memory is asked for
            kept = _Entry(weakref.ref(model, self._forget_dead), _way_of(model, is_drafter), text, *cache.copied())
            self._entries = [*entries, kept]

    def _of(self, model: nn.Module, is_drafter: bool) -> list[_Entry]:
        """The texts that this model, as it is now, has rows of."""
        way = _way_of(model, is_drafter)
        return [entry for entry in self._entries if entry.model() is model and entry.made_as == way]

    def _forget_dead(self, model: weakref.ref[nn.Module]) -> None:
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.model is not model]


def _way_of(model: nn.Module, is_drafter: bool) -> Hashable:
    """What can be changed about a model object, or around it, so that its rows come out otherwise."""
    device = computing_device(model)
    is_autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_autocast else model.dtype
    return device, model.dtype, dtype, state_of(model, reads_weights=False, reads_code=not is_drafter)


@attrs.frozen(eq=False)
class RunningRows:
    """Rows of a text that is still being generated."""

    model: nn.Module
    way: Hashable  # see _way_of
    token_ids: Tensor  # [at least as many as there are rows] int64
    cache: KeyValueCache  # with one lane

    def num_common(self, token_ids: Tensor) -> int:
        """Rows that both texts begin with."""
        return _num_common(self.token_ids[: self.cache.length], token_ids)


def _num_common(some: Tensor, others: Tensor) -> int:
    num = min(some.numel(), others.numel())
    return int((some[:num] == others[:num]).cumprod(0).sum())


@attrs.define(eq=False)
class PrefixReuse:
    """One session's use of a prefix cache, for the caches of its models."""

    prefix_cache: PrefixCache
    _models: dict[KeyValueCache, nn.Module] = attrs.field(factory=dict, init=False)
    _ways: dict[KeyValueCache, Hashable] = attrs.field(factory=dict, init=False)  # how the models were at the beginning
    _targets: KeyValueCache | None = attrs.field(default=None, init=False)

    def add(self, model: nn.Module, cache: KeyValueCache) -> None:
        """Have a model's cache take part; the target's first."""
        if self._targets is None:
            self._targets = cache
        self._models[cache] = model
        self._ways[cache] = _way_of(model, cache is not self._targets)

    def hold_only(self, cache: KeyValueCache) -> None:
        """Let go of all caches but this one."""
        for other in [held for held in self._models if held is not cache]:
            del self._models[other], self._ways[other]

    def fill(self, cache: KeyValueCache, token_ids: Tensor, beside: Sequence[RunningRows] = ()) -> int:
        """Copy rows into one of the caches, unless it has any; how many rows were copied.

        Args:
            cache: it has been added.
            token_ids: [tokens] int64, what it is to be filled with.
            beside: rows of texts that are still being generated, between two of their iterations.
        """
        if cache.length > 0:
            return 0
        alike = [one for one in beside if self._suits(cache, one)]
        best = max(alike, key=lambda one: one.num_common(token_ids), default=None)
        model, is_drafter = self._models[cache], cache is not self._targets
        if best is not None:
            num_common = best.num_common(token_ids)
            if num_common > self.prefix_cache.num_known(model, token_ids, is_drafter=is_drafter):
                cache.load(best.cache.keys, best.cache.values, num_common)
                return num_common
        return self.prefix_cache.take(model, token_ids, cache, is_drafter=is_drafter)

    def running(self, committed_ids: Tensor) -> RunningRows | None:
        """The target's rows of this generation, for others to copy; None before there are any."""
        cache = self._targets
        if cache is None or cache.length == 0 or not cache.can_record:
            return None
        return RunningRows(self._models[cache], self._ways[cache], committed_ids, cache)

    def _suits(self, cache: KeyValueCache, rows: RunningRows) -> bool:
        """Whether rows are those that the same model, as it was when this generation began, would make here."""
        is_same_model = rows.model is self._models[cache] and rows.way == self._ways[cache]
        return is_same_model and type(rows.cache) is type(cache) and rows.cache is not cache

    def keep(self, committed_ids: Tensor, max_bytes: int | None = None) -> None:
        """Keep the rows of all caches. Where not all fit, the target's matter most: they come last.

        Args:
            committed_ids: [committed] int64, of which each cache has rows of the first.
            max_bytes: as for `PrefixCache.keep`.
        """
        for cache, model in reversed(self._models.items()):
            is_drafter = cache is not self._targets
            if _way_of(model, is_drafter) == self._ways[cache]:  # or some rows are of another adapter than others
                self.prefix_cache.keep(model, committed_ids, cache, is_drafter=is_drafter, max_bytes=max_bytes)
