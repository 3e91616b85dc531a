"""`python -m dynatree_core`: the `dynatree` command, with the interpreter that is named."""

from dynatree_core.cli import main

if __name__ == "__main__":
    main()
