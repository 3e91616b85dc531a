"""Settings and fixtures that several test files use."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out; read when the hub's client is imported
# commands take a GPU where they see one, and so would their tests; read when torch first looks for one
os.environ.update({} if os.environ.get("DYNATREE_TEST_GPU") == "1" else {"CUDA_VISIBLE_DEVICES": ""})

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from transformers.utils import logging as transformers_logging

from dynatree_core.cli.quiet import IMPORTED, quiet_imports

NO_GPU = "no CUDA device here"  # why a test is skipped that needs one

quiet_imports()
torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")

# the same examples each time, so that a run can be repeated; `thorough` and `make fuzz` try others
settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=1000, derandomize=False)
# no search for a simpler example: it is enough that one fails (tests/mutants.py)
settings.register_profile("mutants", parent=settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("DYNATREE_HYPOTHESIS_PROFILE", "default"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of clients (`make test-clients`) and of Triton's kernels (test_triton.py) run where they are asked for."""
    folder = collection_path.name
    is_asked_for = any(folder in Path(argument.partition("::")[0]).parts for argument in config.args)
    is_apart = collection_path.parent == Path(__file__).parent and folder in ("clients", "triton_cases")
    return True if is_apart and not is_asked_for else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take long run last: a fault in another is known sooner, and processes end at about the same time.

    What is skipped where there is no GPU is marked `gpu`.
    """
    for item in items:
        if any(mark.kwargs.get("reason") == NO_GPU for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # else in their order


@pytest.fixture(autouse=True)
def libraries_speak_again() -> Iterator[None]:
    """A command quietens libraries for its whole process, which here is that of the next test too."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", *IMPORTED)]
    levels = [logger.level for logger in loggers]
    has_bars = transformers_logging.is_progress_bar_enabled()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    if has_bars:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True, scope="session")
def costs_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs of the tests' models, and what was read of plugins, are kept for one run, and not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder, plugins = tmp_path_factory.mktemp("costs"), tmp_path_factory.mktemp("plugins")
        patch.setattr("dynatree_core.engine.costs.folder", lambda: folder)
        patch.setattr("dynatree_core.plugins.remembered.folder", lambda: plugins)
        yield


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every test that takes it runs on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def character_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of characters, with a tokenizer and a chat template; not to be changed."""
    from character_target import save_target

    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each experiment, made up; not to be changed."""
    from fake_results import write_run

    from dynatree_bench.run.experiments import EXPERIMENTS

    folder = tmp_path_factory.mktemp("runs")
    for name in EXPERIMENTS:
        write_run(folder, name, num_prompts=2, max_new_tokens=30)
    return folder


@pytest.fixture
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynatree_bench.report import style

    monkeypatch.setitem(style.STYLE, "savefig.dpi", 40)


@pytest.fixture(scope="session")
def main_page(runs: Path) -> Path:
    """The report of the run of `main`."""
    from dynatree_bench.report import style
    from dynatree_bench.report.page import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "savefig.dpi", 40)
        return report(runs / "main")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file of running text."""
    file = tmp_path / "book.txt"
    file.write_text("".join(f"the cat number {chr(97 + i % 26)} sat on a mat. it was happy\n" for i in range(120)))
    return file
