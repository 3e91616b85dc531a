"""Caches: the keys and values of committed and undecided tokens."""

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.cache.sink_cache import SinkCache, SinkWindow
from dynatree_core.cache.tree_cache import TreeCache

__all__ = ["KeyValueCache", "PrefixCache", "SinkCache", "SinkWindow", "TreeCache"]
