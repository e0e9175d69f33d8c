"""warmerge: one robust reward model out of many (WARM, arXiv 2401.12187).

>>> import warmerge
>>> warmerge.RefusedError.exit_code
3
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from warmerge.errors import Finding, InterruptedMerge, RefusedError, RemoteError, UsageError, WarmergeError

if TYPE_CHECKING:
    from warmerge.pipeline.average import Merged, average, average_into
    from warmerge.pipeline.inspect import Inspection, inspect

__all__ = [
    "Finding",
    "Inspection",
    "InterruptedMerge",
    "Merged",
    "RefusedError",
    "RemoteError",
    "UsageError",
    "WarmergeError",
    "average",
    "average_into",
    "inspect",
]

# Imported when first used, so that `import warmerge` does not import torch.
_LAZY = {
    "Merged": "warmerge.pipeline.average",
    "average": "warmerge.pipeline.average",
    "average_into": "warmerge.pipeline.average",
    "Inspection": "warmerge.pipeline.inspect",
    "inspect": "warmerge.pipeline.inspect",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'warmerge' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
