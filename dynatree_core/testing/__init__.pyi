from . import models as models
from . import strategies as strategies
from .conformance import PolicyMachine, assert_drafter_contract, assert_hook_contract, assert_lossless
from .text import format_tree

__all__ = [
    "PolicyMachine",
    "assert_drafter_contract",
    "assert_hook_contract",
    "assert_lossless",
    "format_tree",
    "models",
    "strategies",
]
