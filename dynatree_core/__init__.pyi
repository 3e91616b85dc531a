from .audit import AuditReport, Rounding, audit_generation, audit_output
from .cache.prefix_cache import PrefixCache
from .cache.sink_cache import SinkWindow
from .cost_model import CostModel, StepFunction
from .drafters.base import Drafter, DraftPlan, DraftState
from .drafters.build import build_drafter
from .drafters.model import ModelDraftState
from .engine.decode import decode_step, prefill
from .engine.engine import Engine
from .engine.handle import Event, Handle
from .engine.observer import Observer, Outcome
from .engine.scheduler import Load
from .engine.session import Session
from .errors import DynaTreeError, InputError
from .generation import generate, generate_batch, run, stream, stream_batch
from .models.load import LoadedModel, load_model
from .plugins.params import choice, count, fraction
from .plugins.spec import PluginSpec, format_stack, parse_stack
from .policy.acceptance import AcceptanceEstimator
from .policy.build import build_stack
from .policy.hookspecs import hookimpl
from .policy.stack import PolicyStack
from .report import GenerationReport, GenerationResult, StepStats, TokenLogprob
from .request.grammar import Grammar
from .request.limits import Limits
from .tree.frontier import Frontier, Proposals
from .tree.token_tree import TokenTree
from .tree.verdict import StepReport, Verdict

__all__ = [
    "AcceptanceEstimator",
    "AuditReport",
    "CostModel",
    "DraftPlan",
    "DraftState",
    "Drafter",
    "DynaTreeError",
    "Engine",
    "Event",
    "Frontier",
    "GenerationReport",
    "GenerationResult",
    "Grammar",
    "Handle",
    "InputError",
    "Limits",
    "Load",
    "LoadedModel",
    "ModelDraftState",
    "Observer",
    "Outcome",
    "PluginSpec",
    "PolicyStack",
    "PrefixCache",
    "Proposals",
    "Rounding",
    "Session",
    "SinkWindow",
    "StepFunction",
    "StepReport",
    "StepStats",
    "TokenLogprob",
    "TokenTree",
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
    "generate_batch",
    "hookimpl",
    "load_model",
    "parse_stack",
    "prefill",
    "run",
    "stream",
    "stream_batch",
]
