"""The built-in tree policies: one a file, each an entry point of `dynatree.policies`, none importing another."""
