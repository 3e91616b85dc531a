"""DynaTree's core: token trees, their verification and caches, and the hooks that policies implement.

The public names are listed in `__init__.pyi` and loaded when they are first used, so that the command line can show
its help, and be interrupted, without waiting seconds for torch and transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
