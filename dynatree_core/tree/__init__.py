"""The token tree: growing it, what policies see of it, and its layout for one forward pass."""

from dynatree_core.tree.flatten import FlatTrees, flatten
from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

__all__ = ["FlatTrees", "Frontier", "Proposals", "StepReport", "TokenTree", "Verdict", "flatten"]
