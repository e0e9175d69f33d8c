"""What was installed when a result was made."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata


@cache
def versions() -> dict[str, str]:
    """Versions of warmerge, Python and the libraries that decide a result. Imports none of them."""
    names = ("warmerge", "torch", "safetensors", "transformers", "huggingface-hub")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
