"""Who may import whom, and that each module imports alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dynatree_core", "dynatree_policies", "dynatree_bench")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "templates" not in path.parts  # packages of their own
)


def imported_names(module: str) -> set[str]:
    """Every `a.b.c` that a module imports, as `a.b.c` or `a.b.c.name`."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module):
    package = module.split(".")[0]
    ours = {name for name in imported_names(module) if name.startswith("dynatree_")}
    if package == "dynatree_core":
        assert not {name for name in ours if not name.startswith("dynatree_core")}
    elif package == "dynatree_policies":
        # exactly what a third party sees: the core's public names, and no policy another
        import dynatree_core

        assert ours <= {f"dynatree_core.{name}" for name in dynatree_core.__all__}
    assert not {name for name in imported_names(module) if name.startswith(("pluggy._", "transformers.models"))}


@pytest.mark.slow
def test_each_module_imports_alone():
    """Each in a process of its own, in which only what is not ours was loaded before, to save the time."""
    program = """
import os, sys, importlib
import attrs, click, gguf, rich.console, torch, transformers
transformers.PreTrainedModel, transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # these load lazily
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
        except BaseException as error:
            print(module, type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""
    modules = [module for module in MODULES if not module.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_exist_and_are_documented():
    import dynatree_core

    for name in dynatree_core.__all__:
        assert getattr(dynatree_core, name).__doc__, f"{name} has no docstring"
