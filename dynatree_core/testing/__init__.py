"""The conformance kit: what authors of policies and drafters need to show that theirs are right.

    from dynatree_core.testing import assert_hook_contract, assert_lossless

    def test_my_policy():
        assert_hook_contract("my_policy(x=3)")
        assert_lossless("my_policy(x=3)")

It needs `dynatree[testing]`. The names are listed in `__init__.pyi` and loaded when they are first used: pytest imports
this package to find its plugin, which must cost a run that does not use it nothing.
"""

from typing import Any

import lazy_loader

from dynatree_core.advice import pip_install

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            f"dynatree_core.testing.{name} needs hypothesis, which is not installed: "
            f"{pip_install('dynatree[testing]')}",
            name=error.name,
        ) from error
