"""What differs between two nested dicts of settings, in one line for an error message."""

from __future__ import annotations

from typing import Any


def differences(found: dict[str, Any], expected: dict[str, Any], limit: int = 4) -> str:
    """`key found -> expected` for the entries of two nested dicts that differ."""
    flat_found, flat_expected = _flat(found), _flat(expected)
    lines = [
        f"{name} {flat_found.get(name)!r} -> {flat_expected.get(name)!r}"
        for name in sorted(flat_found.keys() | flat_expected.keys())
        if flat_found.get(name) != flat_expected.get(name)
    ]
    return ", ".join(lines[:limit]) + (
        f" and {len(lines) - limit} more" if len(lines) > limit else ""
    )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = list(item) if isinstance(item, tuple) else item
    return flat
