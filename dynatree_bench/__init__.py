"""Benchmarks: programs that measure, never timed asserts."""

from dynatree_core.cli.quiet import quiet_imports
from dynatree_core.moved import install

quiet_imports()  # its programs import transformers before anything of theirs runs

_IN = {
    "data": "prompts published synthetic turns workloads",
    "run": "bandwidth experiments machine measure methods pairs profile quantised records rivals runnable",
    "report": "figures formulas memory_share oracle statistics",
    "studies": "drafter_value long_context rehearse roofline",
}
install(__name__, {module: (f"{room}.{module}",) for room, modules in _IN.items() for module in modules.split()})
