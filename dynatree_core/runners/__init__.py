"""Runners: how a forward pass is computed."""

from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner

__all__ = ["Kept", "PassOutput", "Rows", "Runner", "RunnerAround"]
