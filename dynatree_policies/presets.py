"""Stacks with names of their own: the three phases of the published DynaTree, and EAGLE-2's trees.

`phase3:plan` and the like give each policy its `plan` parameter set, the second published one.
"""

PHASE1 = "fixed(depth=5)+confidence"
PHASE2 = "confidence+dynamic_depth"
PHASE3 = "confidence+dynamic_depth+history"

# Li et al. 2024: trees of 6 levels, 10 nodes expanded in each, 60 tokens verified
EAGLE2 = "best_first(nodes=60,depth=6,beam=10,branch=10)"
