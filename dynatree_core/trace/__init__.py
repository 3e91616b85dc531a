"""The trace of generations: a file in which every iteration can be looked at afterwards (docs/trace.md).

The names are listed in `__init__.pyi` and loaded when they are first used: recording needs torch, and reading, which
`dynatree view` does, must answer without waiting seconds for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
