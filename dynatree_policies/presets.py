"""Stacks with names of their own: the three phases of the published DynaTree.

`phase3:plan` and the like give each policy its `plan` parameter set, the second published one.
"""

PHASE1 = "fixed(depth=5)+confidence"
PHASE2 = "confidence+dynamic_depth"
PHASE3 = "confidence+dynamic_depth+history"
