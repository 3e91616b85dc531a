"""Distillation: a small drafter for any target, taught by what the target itself says.

`run` is the whole of it. The stages, one file each: `prompts` (what is asked), `teach` and `teacher` (what the target
says, stored once), `train` (many passes over what is stored), `evaluate` (what the drafter is worth) and `card`.
The student itself is `dynatree_core.models.student`, which drafting needs too.
"""
