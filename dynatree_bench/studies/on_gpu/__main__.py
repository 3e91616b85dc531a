"""`python -m dynatree_bench.studies.on_gpu STEP GIVEN`: compute a step; the last line is what it found, as JSON."""

from __future__ import annotations

import json
import sys

from dynatree_bench.studies.on_gpu.given import Given
from dynatree_bench.studies.on_gpu.steps import STEPS

if __name__ == "__main__":
    _, name, given = sys.argv
    found = STEPS[name].measure(Given(**json.loads(given)))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
