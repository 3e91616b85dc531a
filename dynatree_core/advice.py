"""Commands in messages: as they can be copied into this machine's shell, for the environment that runs this."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["pip_install"]


def pip_install(*requirements: str) -> str:
    """The command that installs into this environment, whichever `python` and `pip` a shell would find.

    Environments that uv makes have no pip, and are filled by uv.
    """
    found = shutil.which("python")
    is_ours = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if is_ours else shlex.quote(sys.executable)
    what = shlex.join(requirements)
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install {what}"
    if shutil.which("uv") is not None:
        return f"uv pip install --python {shlex.quote(sys.executable)} {what}"
    return f"{python} -m ensurepip && {python} -m pip install {what}"
