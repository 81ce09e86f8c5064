"""Reads YAML strictly and by the types that are expected: a key that stands twice is an error, and
where text is expected, the value is the very text that stands in the file.

YAML 1.1 by itself reads 0012 as the octal number 10, 1_000 as 1000, yes as true and 12:30 as 750,
and takes the last of two equal keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, Optional, get_args, get_origin

import yaml

TEXT = (str, str | None, Optional[str])  # noqa: UP045 - the two spellings compare unequal


def read_yaml(text: str, leaves: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key of a file.

    Args:
        text: content of the file.
        leaves: dotted name -> type of the value; a mapping is entered where its name is not here.

    Raises:
        yaml.YAMLError: no YAML, no mapping, or a key that stands twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(
                problem="a value without a key, where 'key: value' lines are expected"
            )
        yield from _read_mapping(loader, node, leaves, "")
    finally:
        loader.dispose()


def read_yaml_value(text: str, expected: Any) -> Any:
    """One value, as a command line gives it."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _read_value(loader, node, expected)
    finally:
        loader.dispose()


def _read_mapping(
    loader: yaml.SafeLoader, node: yaml.MappingNode, leaves: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    for key, value in _pairs(loader, node):
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and name not in leaves:
            yield from _read_mapping(loader, value, leaves, f"{name}.")
        else:
            yield name, _read_value(loader, value, leaves.get(name))


def _pairs(
    loader: yaml.SafeLoader, node: yaml.MappingNode
) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The entries of a mapping, those that it takes over by `<<` included."""
    own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = next((name for name in own if own.count(name) > 1), None)
    if twice is not None:
        raise yaml.MarkedYAMLError(
            problem=f"the key '{twice}' twice; remove one", problem_mark=node.start_mark
        )
    loader.flatten_mapping(node)
    last = {key.value: (key, value) for key, value in node.value}
    return list(last.values())


def _read_value(loader: yaml.SafeLoader, node: yaml.Node, expected: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        _, kind = get_args(expected) if get_origin(expected) is dict else (None, None)
        return {
            loader.construct_object(key, deep=True): _read_value(loader, value, kind)
            for key, value in _pairs(loader, node)
        }
    if isinstance(node, yaml.SequenceNode):
        kinds = [kind for kind in get_args(_without_none(expected)) if kind is not NoneType]
        return [_read_value(loader, item, kinds[0] if kinds else None) for item in node.value]
    if _takes_text(expected) and node.tag != "tag:yaml.org,2002:null":
        return node.value
    return loader.construct_object(node, deep=True)


def _takes_text(expected: Any) -> bool:
    # a list may be given as its only item
    item = get_args(expected)[:1] if get_origin(expected) is list else ()
    return expected in TEXT or item == (str,)


def _without_none(expected: Any) -> Any:
    """`list[str]` of `list[str] | None`."""
    kinds = [kind for kind in get_args(expected) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 and NoneType in get_args(expected) else expected
