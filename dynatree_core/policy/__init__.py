"""Policies: the hooks, and the stack that asks them."""
