"""Measuring: the models, the methods, the machine, and the records that a run leaves behind."""
