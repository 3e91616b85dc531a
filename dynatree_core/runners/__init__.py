"""Runners: how a forward pass is computed."""
