"""Distillation: a small drafter for any target, taught by what the target itself says.

The stages, one file each: `prompts` (what is asked), `teacher` (what the target says, stored once), `student` (the
small model), `train` (many passes over what is stored), `evaluate` (what the drafter is worth) and `card`.
"""
