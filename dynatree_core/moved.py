"""Module paths of version 0.1 that have moved into rooms: still importable in this version, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import attrs

__all__ = ["LEFT", "MOVED", "install", "left_name", "names_of"]

MOVED: dict[str, tuple[str, ...]] = {  # old module of dynatree_core -> where its names are now
    "cache": ("cache.tree_cache",),
    "models": ("models.load",),
    "plugins": ("plugins.registry", "plugins.presets", "policy.build", "drafters.build"),
    "tree": ("tree.token_tree",),
    "records": ("report", "cost_model", "tree.frontier", "tree.flatten", "tree.verdict", "request.limits"),
    "composition": ("plugins.spec",),
    "distributions": ("plugins.distributions",),
    "foreign": ("plugins.foreign",),
    "params": ("plugins.params",),
    "flatten": ("tree.flatten",),
    "architectures": ("models.architectures",),
    "embedded": ("models.embedded", "files.folders"),
    "model_state": ("models.state",),
    "student": ("models.student",),
    "wrappers": ("models.wrappers",),
    "prefix_cache": ("cache.prefix_cache",),
    "sink_cache": ("cache.sink_cache",),
    "captured": ("runners.cudagraph",),
    "packed": ("runners.packed",),
    "runner": ("runners.choice", "runners.passes"),
    "acceptance": ("policy.acceptance",),
    "hookspecs": ("policy.hookspecs",),
    "stack": ("policy.stack", "policy.registration"),
    "arguments": ("request.arguments",),
    "processors": ("request.processors",),
    "sampling": ("request.sampling",),
    "stopping": ("request.stopping",),
    "commit": ("engine.commit",),
    "costs": ("engine.costs",),
    "decode": ("engine.decode",),
    "draft": ("engine.draft",),
    "feedback": ("engine.feedback",),
    "metrics": ("engine.metrics",),
    "prune": ("engine.prune",),
    "row_probe": ("engine.row_probe",),
    "session": ("engine.session",),
    "verify": ("engine.verify",),
    "hf_entry": ("hf.entry",),
    "hf_export": ("hf.export",),
    "chat": ("cli.chat", "conversation"),
    "console": ("cli.console", "cli.screen", "cli.generate_report", "text.stream"),
    "scaffold": ("cli.scaffold",),
}
LEFT = {"SinkCache": "cache", "TreeCache": "cache"}  # names that were in the root -> the room that has them
PACKAGE = "dynatree_core"


def install(package: str, moved: Mapping[str, tuple[str, ...]]) -> None:
    """Have old module paths of a package imported from where their names are now: old module -> its new ones."""
    finder = _Finder(package, moved)
    if finder not in sys.meta_path:
        sys.meta_path.append(finder)  # last: it is asked for what nobody has


def names_of(old: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package that has the name of an old module: the module's names, with a warning."""

    def __getattr__(name: str) -> Any:
        # `from package import submodule` asks here first, and must not import what the old module has become
        is_name = not name.startswith("__") and find_spec(f"{PACKAGE}.{old}.{name}") is None
        new = [importlib.import_module(f"{PACKAGE}.{path}") for path in MOVED[old]] if is_name else []
        for module in new:
            if hasattr(module, name):
                _warn(f"{PACKAGE}.{old}.{name}", f"{module.__name__}.{name}", 3)
                return getattr(module, name)
        raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute '{name}'")

    return __getattr__


def left_name(name: str) -> Any:
    """A name that was among the public ones of the root, with a warning."""
    room = f"{PACKAGE}.{LEFT[name]}"
    _warn(f"{PACKAGE}.{name}", f"{room}.{name}", 2)
    return getattr(importlib.import_module(room), name)


@attrs.frozen
class _Finder:
    """Finds the old modules, and loads each as a module with the names that it had."""

    package: str
    moved: Mapping[str, tuple[str, ...]]

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == self.package and old in self.moved else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the usual one

    def exec_module(self, module: ModuleType) -> None:
        paths = self.moved[module.__name__.rpartition(".")[2]]
        new = [importlib.import_module(f"{self.package}.{path}") for path in paths]
        _warn(module.__name__, " and ".join(one.__name__ for one in new), 2)
        for one in new:
            public = getattr(one, "__all__", [name for name in vars(one) if not name.startswith("_")])
            vars(module).update({name: getattr(one, name) for name in public})


def _warn(old: str, new: str, level: int) -> None:
    warnings.warn(f"{old} has moved to {new}; import it from there", DeprecationWarning, stacklevel=level + 1)
