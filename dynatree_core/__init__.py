"""DynaTree's core: token trees, their verification and caches, and the hooks that policies implement.

The public names are listed in `__init__.pyi` and loaded when they are first used, so that the command line can show
its help, and be interrupted, without waiting seconds for torch and transformers.
"""

from typing import Any

import lazy_loader

from dynatree_core import moved

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.install(__name__, moved.MOVED)


def __getattr__(name: str) -> Any:
    return moved.left_name(name) if name in moved.LEFT else _public(name)
