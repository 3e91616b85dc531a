"""`python -m dynatree_bench.studies.on_gpu STEP GIVEN FILE`: compute a step, and leave what it found there, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dynatree_bench.studies.on_gpu.given import Given
from dynatree_bench.studies.on_gpu.steps import STEPS
from dynatree_core.files.writing import write_text

if __name__ == "__main__":
    _, name, given, file = sys.argv
    found = STEPS[name].measure(Given(**json.loads(given)))
    write_text(Path(file), json.dumps(found) + "\n")
