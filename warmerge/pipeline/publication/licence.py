"""Under which licence the members are: what may be said of an average of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmerge.errors import RemoteError, UsageError, WarmergeError
from warmerge.weights.foreign_json import text_of
from warmerge.weights.locate import open_checkpoint
from warmerge.weights.remote.pushing import LICENSE_FIELDS, license_of
from warmerge.weights.samples import read_sample

# Characters of a card's front matter that are read: YAML takes 300 times their size.
_FRONT_MATTER = 100_000


def licence_of_members(manifest: Mapping[str, Any] | None, folder: Path) -> tuple[dict[str, str], str]:
    """The licence that all members state (fields of a model card; {} where they do not agree), and how it was found.

    Args:
        manifest: warmerge.json of the model; without it the licence is looked for in the folder's own README.md.
        folder: the model's.
    """
    members = [entry for entry in (manifest or {}).get("inputs", []) if entry["role"] == "member"]
    if not members:
        own = stated(folder / "README.md")
        return own, "as README.md says" if own else "README.md states none"
    try:
        found = {f"member {number}": _of_member(entry) for number, entry in enumerate(members, start=1)}
    except (RemoteError, UsageError) as error:  # a member that was there when it was merged, and is not now
        return {}, str(error)
    first = next(iter(found.values()))
    if first and all(other == first for other in found.values()):
        return first, "that of all members"
    return {}, ", ".join(f"{name}: {fields.get('license', 'none stated')}" for name, fields in found.items())


def stated(readme: Path) -> dict[str, str]:
    """The licence fields in a README.md's front matter; {} where there are none, or it is too long."""
    import yaml

    try:
        text = text_of(readme)
    except (OSError, ValueError):
        return {}
    parts = text.split("---\n", 2)
    if parts[0].strip() or len(parts) < 3 or len(parts[1]) > _FRONT_MATTER:
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a day that no month has is a ValueError
        return {}
    if not isinstance(front, dict):
        return {}
    found = {key: front.get(key) for key in LICENSE_FIELDS}
    return {key: value for key, value in found.items() if value and isinstance(value, str)}  # a list is no one licence


def _of_member(entry: Mapping[str, Any]) -> dict[str, str]:
    if "repo" in entry:
        return license_of(entry["repo"], entry["revision"])
    # As it was typed, which may name another model from where we are now; a record that was published names none.
    folder = Path(entry.get("checkpoint", ""))
    # os.path: a name that is too long for a folder is that of none.
    known = "checkpoint" in entry and os.path.isdir(folder) and _is(folder, entry)
    return stated(folder / "README.md") if known else {}


def _is(folder: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return bool(read_sample(open_checkpoint(folder, entry.get("base"))).fingerprint == entry["fingerprint"])
    except WarmergeError:  # it is gone, or no model
        return False
