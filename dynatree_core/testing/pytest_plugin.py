"""A pytest plugin: `--dynatree-policy STACK` and `--dynatree-drafter NAME` run the conformance suite on these.

Every property is an item of its own, `dynatree::PROPERTY[STACK]`; no test file is needed. A run without these options
loads nothing more than this file: neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

__all__ = ["ConformanceItem", "ConformanceSuite"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dynatree", "conformance of DynaTree policies and drafters")
    group.addoption(
        "--dynatree-policy",
        action="append",
        default=[],
        metavar="STACK",
        help="check this stack of installed policies, such as 'my_policy(x=3)'; may be repeated",
    )
    group.addoption(
        "--dynatree-drafter",
        action="append",
        default=[],
        metavar="NAME",
        help="check this installed drafter, such as 'prompt_lookup(max_ngram=3)'; may be repeated",
    )
    group.addoption(
        "--dynatree-examples",
        type=int,
        default=50,
        metavar="N",
        help="examples to try for each property (default: 50)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse names that no installed package provides, as pytest refuses unknown options."""
    policies, drafters = config.getoption("--dynatree-policy"), config.getoption("--dynatree-drafter")
    if config.getoption("--dynatree-examples") < 1:
        raise pytest.UsageError("--dynatree-examples must be at least 1")
    if not policies and not drafters:
        return
    from dynatree_core.drafters.build import build_drafter
    from dynatree_core.errors import DynaTreeError
    from dynatree_core.policy.build import build_stack

    try:
        from dynatree_core.testing import assert_lossless  # noqa: F401 (it says what is missing)
    except ModuleNotFoundError as error:
        raise pytest.UsageError(str(error)) from error

    for option, build, names in (
        ("--dynatree-policy", build_stack, policies),
        ("--dynatree-drafter", build_drafter, drafters),
    ):
        for name in names:
            try:
                build(name)
            except DynaTreeError as error:
                raise pytest.UsageError(f"{option}: {error}") from error


@pytest.hookimpl(tryfirst=True)  # before -k chooses among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--dynatree-policy") or config.getoption("--dynatree-drafter"):
        suite = ConformanceSuite.from_parent(session, name="dynatree", nodeid="dynatree", path=session.path)
        items.extend(session.genitems(suite))


class ConformanceSuite(pytest.Collector):
    """The collector of the suite's items, which come from no file."""

    def collect(self) -> Iterator[pytest.Item]:
        from dynatree_core.testing.conformance import DRAFTER_PROPERTIES, POLICY_PROPERTIES

        for option, properties in (
            ("--dynatree-policy", POLICY_PROPERTIES),
            ("--dynatree-drafter", DRAFTER_PROPERTIES),
        ):
            for name in self.config.getoption(option):
                for title, check in properties.items():
                    yield ConformanceItem.from_parent(self, name=f"{title}[{name}]", check=check, subject=name)


class ConformanceItem(pytest.Item):
    """One property of one stack or drafter."""

    def __init__(self, *, check: Callable[[str, int], None], subject: str, **of_pytest: Any) -> None:
        super().__init__(**of_pytest)
        self.check, self.subject = check, subject

    def runtest(self) -> None:
        self.check(self.subject, self.config.getoption("--dynatree-examples"))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message and notes without a traceback, which would show the kit's own code only."""
        from dynatree_core.errors import DynaTreeError

        error = excinfo.value
        if not isinstance(error, AssertionError | DynaTreeError):
            return super().repr_failure(excinfo, style)
        return "\n".join([f"{type(error).__name__}: {error}", "", *getattr(error, "__notes__", [])])

    def reportinfo(self) -> tuple[Any, None, str]:
        return self.path, None, self.name
