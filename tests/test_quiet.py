"""Programs keep silent about what libraries log while they are imported, and about that only."""

from __future__ import annotations

import subprocess
import sys

import pytest
from packages import ROOT

# stands for torchao, which logs what it cannot load; a plain import of transformers would import it
NOISY = """
import logging

logging.getLogger("torchao").warning("Failed to load a kernel")
logging.getLogger("torch.utils._pytree").warning("is deprecated")
logging.getLogger("torchao").error("an error")
logging.getLogger("another").warning("a warning of another library")
"""
ENTRIES = {
    "the command": "from dynatree_core.cli import group as cli\ncli.end_process = lambda command: None\ncli.main([])",
    "a program that measures": "import dynatree_bench",
}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_only_what_imports_log_is_left_out(entry):
    done = subprocess.run([sys.executable, "-c", entry + NOISY], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines() == ["an error", "a warning of another library"]


@pytest.mark.slow
def test_the_package_alone_changes_no_logger():
    program = "import dynatree_core" + NOISY
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert len(done.stderr.splitlines()) == 4
