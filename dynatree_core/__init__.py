"""DynaTree's core: token trees, their verification and caches, and the hooks that policies implement."""

from dynatree_core.cache import TreeCache
from dynatree_core.composition import PluginSpec, format_stack, parse_stack
from dynatree_core.decode import decode_step, prefill
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.errors import DynaTreeError, InputError
from dynatree_core.generation import generate, run, stream
from dynatree_core.hookspecs import hookimpl
from dynatree_core.models import LoadedModel, load_model
from dynatree_core.params import choice, count, fraction
from dynatree_core.plugins import build_drafter, build_stack
from dynatree_core.records import (
    Frontier,
    GenerationReport,
    GenerationResult,
    Limits,
    Proposals,
    StepReport,
    StepStats,
    Verdict,
)
from dynatree_core.session import Session
from dynatree_core.stack import PolicyStack
from dynatree_core.tree import TokenTree

__all__ = [
    "DraftPlan",
    "DraftState",
    "Drafter",
    "DynaTreeError",
    "Frontier",
    "GenerationReport",
    "GenerationResult",
    "InputError",
    "Limits",
    "LoadedModel",
    "PluginSpec",
    "PolicyStack",
    "Proposals",
    "Session",
    "StepReport",
    "StepStats",
    "TokenTree",
    "TreeCache",
    "Verdict",
    "build_drafter",
    "build_stack",
    "choice",
    "count",
    "decode_step",
    "format_stack",
    "fraction",
    "generate",
    "hookimpl",
    "load_model",
    "parse_stack",
    "prefill",
    "run",
    "stream",
]
