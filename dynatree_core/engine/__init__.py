"""The engine: the stages of a decode step, and the state of a generation."""
