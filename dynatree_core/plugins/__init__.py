"""Plugins: what installed packages provide, found by name. Without torch."""

from dynatree_core.moved import names_of

__getattr__ = names_of("plugins")
