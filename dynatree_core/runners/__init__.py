"""Runners: how a forward pass is computed."""

from dynatree_core.runners.base import Kept, PassOutput, Runner

__all__ = ["Kept", "PassOutput", "Runner"]
