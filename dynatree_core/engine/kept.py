"""What is kept by model stands in the room of models, since drafters and measured costs need it too."""

from __future__ import annotations

from dynatree_core.models.kept import kept_of

__all__ = ["kept_of"]
