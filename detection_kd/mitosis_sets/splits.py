"""Training, validation and test fields by case, so that no patient is on two sides.

A split is a table `case,split` (train, val or test). Published ones stand in `published_splits/`
beside this file and are known by name; `scanner:<name>` holds the cases of one scanner out for the
test. Without either, cases are drawn so that every scanner is on every side as far as its number of
cases allows.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from detection_kd.mitosis_sets.case_table import read_case_table
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import MITOSIS, PointSet
from patch_encoder.cohort.labels import read_rows
from wsi_common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
HELD_OUT = "scanner:"
PUBLISHED = Path(__file__).parent / "published_splits"


def read_sides(keys: MitosisSetKeys, seed: int, sides: Sequence[str]) -> list[PointSet]:
    """The fields of these sides of a split; images of the other sides are not even opened.

    Args:
        keys, seed: as for `split_fields`.
        sides: of `SPLITS`.

    Raises:
        UserError: what `read_point_set` and `split_fields` refuse, or a side without fields.
    """
    whole = split_fields(read_point_set(keys, open_images=False), keys, seed)
    wanted = [{field.field_id for field in whole[side].fields} for side in sides]
    for side, ids in zip(sides, wanted, strict=True):
        if not ids:
            raise UserError(f"splits: expected fields in {side}, found none; give it some cases")
    opened = read_point_set(keys, set().union(*wanted))
    return [opened.select(lambda field, ids=ids: field.field_id in ids) for ids in wanted]


def split_fields(
    fields: PointSet,
    keys: MitosisSetKeys,
    seed: int,
    shares: Sequence[float] = (0.7, 0.15, 0.15),
) -> dict[str, PointSet]:
    """The annotated fields of train, val and test.

    Args:
        fields: all fields; those without annotation are in none of the three.
        keys: where the split comes from: `splits`, else the split column of `cases`, else it is
            drawn.
        seed: seed of the drawing, which depends on nothing but it and the fields.
        shares: shares of the cases of train, val and test, where they are drawn.

    Raises:
        UserError: a case in two splits, an unknown split, a split that does not fit the set, or
            fields of a side without any mitotic figure.
    """
    annotated = fields.select(lambda field: field.annotated)
    table, source = _find_table(annotated, keys)
    if not table:
        table, source = draw_split(annotated, shares, seed), f"drawn with seed {seed}"
    elif "val" not in table.values():
        table = _draw_validation(annotated, table, shares, seed)
    absent = [case for case in annotated.cases if case not in table]
    if len(absent) == len(annotated.cases):
        raise UserError(
            f"{source}: expected the cases of the set, as '{absent[0]}', found others, as "
            f"'{next(iter(table))}'"
        )
    if absent:
        logger.warning(
            "%s: %d of %d cases are in no split and left out, first %s",
            source,
            len(absent),
            len(annotated.cases),
            absent[0],
        )
    sides = {side: _select_side(annotated, table, side) for side in SPLITS}
    _check_sides(sides, source)
    return sides


def _check_sides(sides: Mapping[str, PointSet], source: str) -> None:
    for side, part in sides.items():
        if part.fields and not part.count(MITOSIS):
            raise UserError(
                f"{source}: expected mitotic figures in {side}, found none in its "
                f"{len(part.fields)} fields; choose other splits= or another seed"
            )
        logger.info(
            "%s: %d fields of %d cases, %d mitotic figures",
            side,
            len(part.fields),
            len(part.cases),
            part.count(MITOSIS),
        )
    if not sides["train"].fields:
        raise UserError(f"{source}: expected fields to train with, found none")


def _select_side(fields: PointSet, table: Mapping[str, str], side: str) -> PointSet:
    return fields.select(lambda field: table.get(field.case) == side)


def _find_table(fields: PointSet, keys: MitosisSetKeys) -> tuple[dict[str, str], str]:
    """Case -> split as the keys say, perhaps empty, and where that comes from."""
    if keys.splits.startswith(HELD_OUT):
        return hold_out_scanner(fields, keys.splits.removeprefix(HELD_OUT)), keys.splits
    if keys.splits:
        path = find_split_file(keys.splits)
        return read_split(path), str(path)
    if not keys.cases:
        return {}, ""
    path = Path(keys.cases)
    rows = read_case_table(path)
    pairs = [
        (field.case, rows[field.field_id].split)
        for field in fields.fields
        if field.field_id in rows and rows[field.field_id].split
    ]
    return join_splits(pairs, str(path)), str(path)


def hold_out_scanner(fields: PointSet, scanner: str) -> dict[str, str]:
    """Test cases are those of one scanner, all others are to train with: what a network does on
    the pictures of a scanner that it never saw.

    Raises:
        UserError: no field is of that scanner.
    """
    held_out = {field.case for field in fields.fields if field.scanner == scanner}
    if not held_out:
        known = {field.scanner for field in fields.fields}
        raise UserError(
            f"splits={HELD_OUT}{scanner}: expected a scanner of the set, found none of its fields; "
            f"{did_you_mean(scanner, known)}"
        )
    return {case: "test" if case in held_out else "train" for case in fields.cases}


def find_split_file(name: str) -> Path:
    """The table of a path or of a published name.

    Raises:
        UserError: it is neither.
    """
    published = {path.stem: path for path in sorted(PUBLISHED.glob("*.csv"))}
    if name in published:
        return published[name]
    if not Path(name).is_file():
        raise UserError(
            f"splits={name}: expected a table case,split or a published split, found neither; "
            f"{did_you_mean(name, published)}"
        )
    return Path(name)


def read_split(path: Path) -> dict[str, str]:
    """Case -> split of a table `case,split`.

    Raises:
        UserError: no such table, an unknown split, or a case in two splits.
    """
    rows = read_rows(path, ("case", "split"))
    return join_splits([(row["case"], row["split"]) for _, row in rows], str(path))


def join_splits(pairs: Sequence[tuple[str, str]], source: str) -> dict[str, str]:
    """Case -> split of (case, split) pairs.

    Raises:
        UserError: an unknown split, or a case in two splits.
    """
    table: dict[str, str] = {}
    for case, split in pairs:
        if split not in SPLITS:
            raise UserError(f"{source}: case {case}: expected train, val or test, found '{split}'")
        if table.setdefault(case, split) != split:
            raise UserError(
                f"{source}: expected case {case} in one split, found it in {table[case]} and "
                f"{split}"
            )
    return table


def draw_split(fields: PointSet, shares: Sequence[float], seed: int) -> dict[str, str]:
    """Draw a split of the cases, stratified by scanner and by whether a case has mitotic figures.

    The cases of each stratum are shuffled and spread evenly over one line, from which the sides are
    cut: each gets of every stratum what its share allows.

    Raises:
        UserError: shares that do not make a whole, or fewer cases than sides.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares={list(shares)}: expected three that sum to 1, of train, val, test")
    needed = sum(share > 0 for share in shares)
    cases = _spread_cases(fields, seed)
    if len(cases) < needed:
        raise UserError(
            f"splits: expected {needed} cases at least to draw a split, found {len(cases)}; "
            "a case= column says which fields are of one patient"
        )
    counts = [max(1, round(share * len(cases))) if share > 0 else 0 for share in shares]
    counts[int(np.argmax(counts))] += len(cases) - sum(counts)  # the largest side takes the rest
    sides = np.repeat(SPLITS, counts)
    return dict(zip(cases, sides.tolist(), strict=True))


def _spread_cases(fields: PointSet, seed: int) -> list[str]:
    """The cases in an order in which those of each stratum are shuffled and evenly spread."""
    scanners, positive = defaultdict(set), defaultdict(bool)
    for field in fields.fields:
        scanners[field.case].add(field.scanner)
        positive[field.case] |= bool(len(field.mitoses))
    strata = defaultdict(list)
    for case in fields.cases:
        strata[tuple(sorted(scanners[case])), positive[case]].append(case)
    generator = np.random.default_rng(seed)
    places = {}
    for _, members in sorted(strata.items()):
        offset = generator.random()
        for rank, index in enumerate(generator.permutation(len(members)).tolist()):
            places[members[index]] = (rank + offset) / len(members)
    return sorted(places, key=lambda case: (places[case], case))


def _draw_validation(
    fields: PointSet, table: Mapping[str, str], shares: Sequence[float], seed: int
) -> dict[str, str]:
    """The table with validation cases drawn from those to train with, for splits that have none."""
    pool = fields.select(lambda field: table.get(field.case) == "train")
    whole = shares[0] + shares[1]
    drawn = draw_split(pool, (shares[0] / whole, shares[1] / whole, 0.0), seed)
    logger.info("no validation cases in the split: drawn from its training cases")
    return {**table, **drawn}
