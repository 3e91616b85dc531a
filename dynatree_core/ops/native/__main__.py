"""`python -m dynatree_core.ops.native`: compile the operators again, after a change or where installing could not."""

import sys

from dynatree_core.ops.native.build import BuildError, build

try:
    for file in build():
        print(file)
except BuildError as error:
    sys.exit(f"the operators could not be compiled: {error}")
