"""Who may import whom, and that each module imports alone."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dynatree_core import moved

ROOT = Path(__file__).parent.parent
PACKAGES = ("dynatree_core", "dynatree_policies", "dynatree_bench")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if "templates" not in path.parts  # packages of their own
)


def syntax_of(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(module: str) -> set[str]:
    """Every `a.b.c` that a module imports, as `a.b.c` or `a.b.c.name`; for types alone too."""
    names = set()
    for node in ast.walk(syntax_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# the floors of a package from the ground up; on each its rooms, a folder or a file each
FLOORS = {
    "dynatree_core": (
        ("advice", "clock", "cost_model", "errors", "moved", "renamed", "report"),
        ("files", "ops", "tree"),
        ("models", "plugins"),
        ("cache", "policy", "text"),
        ("request", "runners"),
        ("drafters",),
        ("engine",),
        ("conversation", "trace"),
        ("generation", "serve"),
        ("audit", "hf", "testing"),
        ("cli", "__main__"),
    ),
    "dynatree_bench": (("data",), ("run",), ("report",), ("distill",), ("studies",), ("bench_cli", "profile_cli")),
}


def own_imports(module: str) -> set[str]:
    """The modules of its own package that a module imports anywhere, without itself."""
    package = module.split(".")[0]
    names = {name for name in imported_names(module) if name.startswith(f"{package}.")}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return found - {module, package}


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_downward_only(package):
    """From lower floors; the files of the ground know each other, and `python -m` knows the command line."""
    floors = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    wrong = []
    for module in MODULES:
        _, _, inside = module.partition(f"{package}.")
        if not inside:
            continue
        room = inside.split(".")[0]
        assert room in floors, f"{module} is in no room; add it to the list, above those that it imports"
        for name in own_imports(module):
            other = name.split(".")[1]
            is_beside = other == room or room == "__main__" or floors[room] == 0
            if floors[other] > floors[room] or (floors[other] == floors[room] and not is_beside):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_no_room_could_stand_lower():
    """Each imports one of the floor right below, so that there are no more floors than the imports ask for."""
    floors = FLOORS["dynatree_core"]
    needed: dict[str, set[str]] = {room: set() for rooms in floors for room in rooms}
    for module in MODULES:
        if module.startswith("dynatree_core."):
            needed[module.split(".")[1]] |= {name.split(".")[1] for name in own_imports(module)}
    for below, rooms in itertools.pairwise(floors):
        assert [room for room in rooms if room != "__main__" and not needed[room] & set(below)] == []


def test_the_architecture_page_draws_the_floors():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, drawing = page.partition("| floor | room | holds |\n")
    drawn: dict[int, set[str]] = {}
    for line in drawing.partition("\n\n")[0].splitlines()[1:]:
        number, names, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        rooms = {re.sub(r"(/|\.py)$", "", name) for name in re.findall("`(.+?)`", names)}
        drawn.setdefault(int(number), set()).update(rooms)
    assert drawn == {number: set(rooms) for number, rooms in enumerate(FLOORS["dynatree_core"], 1)}


@pytest.mark.parametrize("package", FLOORS)
def test_no_module_imports_itself_in_a_circle(package):
    """For types neither."""
    graph = {module: own_imports(module) for module in MODULES if module.startswith(f"{package}.")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


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


def test_no_method_of_a_living_object_is_replaced():
    """Whoever watches an iteration has an observer; who prices one has a clock, costs, and a runner around another."""
    trees = {module: syntax_of(module) for module in MODULES}
    methods = {"generation_config", "forward", "generate"}
    for tree in trees.values():
        for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            methods |= {part.name for part in kind.body if isinstance(part, ast.FunctionDef) and not is_property(part)}
    # a compiled class of policies has its marked hooks shown by functions; a recorded graph is one of its own
    made_here = {"dynatree_bench.run.methods: twin.generation_config", "dynatree_core.runners.cudagraph: static.replay"}
    replaced = {
        f"{module}: {ast.unparse(target)}"
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr in methods and ast.unparse(target.value) != "self"
    }
    assert replaced - made_here == set()


def is_property(function: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(mark) or ".setter" in ast.unparse(mark) for mark in function.decorator_list)


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
    if importlib.util.find_spec("triton") is None:  # two files are there for where it is
        modules = [module for module in modules if not module.endswith((".triton.kernels", ".triton.operators"))]
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


PACKAGES_NOW = [old for old in moved.MOVED if (ROOT / "dynatree_core" / old).is_dir()]


@pytest.mark.parametrize("old", [old for old in moved.MOVED if old not in PACKAGES_NOW])
def test_an_old_module_path_warns_and_has_the_modules_names(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"dynatree_core.{old}", raising=False)
    with pytest.warns(
        DeprecationWarning, match=f"dynatree_core.{old} has moved to dynatree_core.{moved.MOVED[old][0]}"
    ):
        module = importlib.import_module(f"dynatree_core.{old}")
    assert set(new_names(old)) <= set(vars(module))


@pytest.mark.parametrize("old", PACKAGES_NOW)
def test_a_package_with_an_old_modules_name_has_the_modules_names(old):
    package = importlib.import_module(f"dynatree_core.{old}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # those that are not public there warn
        assert [name for name in new_names(old) if not hasattr(package, name)] == []


def new_names(old: str) -> list[str]:
    """The public names of the modules that an old one has become."""
    return [name for new in moved.MOVED[old] for name in importlib.import_module(f"dynatree_core.{new}").__all__]


def test_old_module_paths_of_the_bench_warn(monkeypatch):
    monkeypatch.delitem(sys.modules, "dynatree_bench.workloads", raising=False)
    with pytest.warns(DeprecationWarning, match="has moved to dynatree_bench.data.workloads"):
        from dynatree_bench import workloads
    from dynatree_bench.data.workloads import load_workload

    assert workloads.load_workload is load_workload


def test_the_command_line_can_be_called_by_its_old_path():
    code = "from dynatree_core.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout[:8]) == (0, "dynatree"), done.stderr


def test_names_that_left_the_root_warn():
    import dynatree_core
    from dynatree_core.cache import TreeCache

    with pytest.warns(DeprecationWarning, match="dynatree_core.TreeCache has moved to dynatree_core.cache.TreeCache"):
        assert dynatree_core.TreeCache is TreeCache
    with pytest.raises(AttributeError):
        dynatree_core.TreeCach  # noqa: B018


def test_public_names_exist_and_are_documented():
    import dynatree_core

    for name in dynatree_core.__all__:
        assert getattr(dynatree_core, name).__doc__, f"{name} has no docstring"
