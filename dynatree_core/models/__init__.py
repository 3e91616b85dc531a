"""Models: loading them, the default one, and what is known of each architecture."""

from dynatree_core.moved import names_of

__getattr__ = names_of("models")
