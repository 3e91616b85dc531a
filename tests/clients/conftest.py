"""A tiny target and its folder with trees, for the clients. A file beside it tells how often the loop was called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from test_docs import DOCS, blocks
from tiny_folder import save_tiny

from dynatree_core.hf.export import LOOP, Chosen, write_folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the clients' own packages warn of is no fault of this one."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)  # a test's own come after it


@attrs.frozen
class Served:
    """The same target twice, by plain decoding and by trees."""

    plain: Path
    trees: Path
    calls: Path  # a line for each call of the folder's loop, in whatever process

    @property
    def num_calls(self) -> int:
        """How often the loop of `trees` was called so far."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


NOTING = """

_counted = generate


def generate(*positional, model, **arguments):
    with open({calls!r}, "a") as file:
        print("called", file=file)
    return _counted(*positional, model=model, **arguments)
"""


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    plain = save_tiny(place / "plain")
    found = Served(plain, place / "trees", place / "calls.txt")
    write_folder(found.trees, plain, "tiny", Chosen("prompt_lookup", "fixed(depth=3)"))
    with (found.trees / LOOP).open("a") as program:
        program.write(NOTING.format(calls=str(found.calls)))
    with pytest.MonkeyPatch.context() as patch:  # transformers copies programs of folders into a cache
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        yield found


@pytest.fixture
def run_shown(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Runs the block of docs/use-it-from.md that needs a module, on the tiny target's folder; what it has defined."""

    def run(module: str) -> dict[str, Any]:
        page = DOCS / "use-it-from.md"
        [block] = [one for one in blocks(page) if one.marker == f"client: {module}"]
        (tmp_path / "smollm2-trees").symlink_to(served.trees)
        monkeypatch.chdir(tmp_path)
        namespace: dict[str, Any] = {"__name__": "shown"}
        before = served.num_calls
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True), namespace)
        assert served.num_calls > before
        return namespace

    return run


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For a client in a process of its own: offline, with caches of its own."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "TRANSFORMERS_VERBOSITY": "error"}
