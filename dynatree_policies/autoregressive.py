"""`autoregressive`: no drafting, one token an iteration. The baseline of every comparison."""

from __future__ import annotations

from typing import ClassVar

import attrs

from dynatree_core import Frontier, hookimpl


@attrs.define
class Autoregressive:
    """No drafting: one token per iteration, the baseline."""

    is_capturable: ClassVar = True

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return False
