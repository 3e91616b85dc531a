"""Drafters: where proposals come from. One file a drafter; `base` is the contract."""
