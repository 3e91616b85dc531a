"""Transformers' own door: `model.generate(..., custom_generate=dynatree_core.hf.generate)`."""

from dynatree_core.hf.custom_generate import FOLDER, generate, generate_with

__all__ = ["FOLDER", "generate", "generate_with"]
