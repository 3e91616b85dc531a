from .acceptance import AcceptanceEstimator
from .audit import AuditReport, Rounding, audit_generation, audit_output
from .cache import TreeCache
from .composition import PluginSpec, format_stack, parse_stack
from .decode import decode_step, prefill
from .drafters.base import Drafter, DraftPlan, DraftState
from .errors import DynaTreeError, InputError
from .generation import generate, run, stream
from .hookspecs import hookimpl
from .models import LoadedModel, load_model
from .params import choice, count, fraction
from .plugins import build_drafter, build_stack
from .prefix_cache import PrefixCache
from .records import (
    CostModel,
    Frontier,
    GenerationReport,
    GenerationResult,
    Limits,
    Proposals,
    StepFunction,
    StepReport,
    StepStats,
    Verdict,
)
from .session import Session
from .sink_cache import SinkCache, SinkWindow
from .stack import PolicyStack
from .tree import TokenTree

__all__ = [
    "AcceptanceEstimator",
    "AuditReport",
    "CostModel",
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
    "PrefixCache",
    "Proposals",
    "Rounding",
    "Session",
    "SinkCache",
    "SinkWindow",
    "StepFunction",
    "StepReport",
    "StepStats",
    "TokenTree",
    "TreeCache",
    "Verdict",
    "audit_generation",
    "audit_output",
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
