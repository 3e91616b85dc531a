"""Tree decoding with DynaTree, by transformers' convention for decoding loops in a folder: the tokens of `generate`.

transformers copies this file into its cache of modules, and calls `generate` with all arguments of `model.generate`.
"""

from typing import Any

try:
    from dynatree_core.hf.entry import generate_as_asked
except ModuleNotFoundError as error:
    if error.name not in ("dynatree_core", "dynatree_core.hf", "dynatree_core.hf.entry"):
        raise
    raise ModuleNotFoundError(
        f"this custom_generate folder needs the package dynatree in the environment, got none with {error.name}; "
        "install it, or load the model without trust_remote_code"
    ) from error

DEFAULTS: dict[str, Any] = {}  # drafter, policy and options, for calls that name none


def generate(*positional: Any, model: Any, **arguments: Any) -> Any:
    """Stand in for `model.generate`, with its arguments and its result."""
    return generate_as_asked(model, positional, arguments, DEFAULTS)
