"""The steps of `dynatree bench gpu`, a file each; `steps` lists them, and a process of its own computes each."""
