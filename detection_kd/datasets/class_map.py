"""Annotated categories merged, renamed or left out, by the `class_map` key of a detector.

A map is `{category: class, ...}`; null leaves a category out, so that its boxes are background, and
`"*"` stands for every category that is not named. What a map does not name stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsi_common.errors import UserError, did_you_mean

OTHERS = "*"
ClassMap = Mapping[str, str | None]


def map_classes(names: Sequence[str], class_map: ClassMap) -> list[str | None]:
    """The class of each category; None where it is left out. A name that is a class already, and
    not named itself, stays what it is.
    """
    classes = {name for name in class_map.values() if name is not None}

    def find(name: str) -> str | None:
        if name in class_map:
            return class_map[name]
        return class_map.get(OTHERS, name) if name not in classes else name

    return [find(name) for name in names]


def check_class_map(names: Sequence[str], class_map: ClassMap, source: str) -> None:
    """Refuse a map that names what is not there, or leaves nothing.

    Args:
        names: annotated categories.
        class_map: the map.
        source: where the categories stand, for the message.

    Raises:
        UserError: one of both, or a class that is no text.
    """
    for name, given in class_map.items():
        if not isinstance(given, str | None):
            raise UserError(
                f"class_map: category '{name}': expected the name of a class or null, found "
                f"{given!r}; write '{{{name}: \"{given}\"}}'"
            )
        if name not in names and name != OTHERS:
            raise UserError(
                f"class_map: category '{name}' is not in {source}, which has {list(names)}; "
                f"{did_you_mean(name, names)}"
            )
    if not any(map_classes(names, class_map)):
        raise UserError(f"class_map: expected at least one class to be left of {list(names)}")


def merge_categories(
    categories: Mapping[int, str], class_map: ClassMap
) -> tuple[dict[int, int | None], list[str], list[int]]:
    """Class indices of a file's categories.

    Args:
        categories: names by their ids, in the order of the ids.
        class_map: the map.

    Returns:
        The class index of every id (None: left out), the class names in the order in which they
        come up, and of each class the first id.
    """
    classes = map_classes(list(categories.values()), class_map)
    names = list(dict.fromkeys(name for name in classes if name is not None))
    indices = {
        identifier: None if name is None else names.index(name)
        for identifier, name in zip(categories, classes, strict=True)
    }
    found = list(indices.values())
    return indices, names, [list(indices)[found.index(index)] for index in range(len(names))]


def relabel_table(names: Sequence[str], class_map: ClassMap, classes: Sequence[str]) -> list[int]:
    """Where each of a detector's classes stands among `classes` after a map; -1 where it is left
    out.

    Raises:
        UserError: a class that is not there.
    """
    table = []
    for name in map_classes(names, class_map):
        if name is not None and name not in classes:
            raise UserError(
                f"class '{name}' of the detector: expected one of the annotated {list(classes)}; "
                "give class_map= that makes both the same"
            )
        table.append(-1 if name is None else classes.index(name))
    return table
