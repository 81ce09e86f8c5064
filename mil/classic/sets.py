"""The classical multiple instance learning sets: Musk1, Musk2, Fox, Tiger, Elephant, in the forms
they are passed on in.

Musk: Dietterich et al., Artificial Intelligence 1997 (a bag is a molecule, an instance a
conformation, 166 features); the animals: Andrews et al., NIPS 2002 (a bag is a picture, an instance
a segment, 230 features). Forms: UCI's `.data` (CSV: molecule, conformation, features, label),
`.jld` (HDF5 with references; `folds` are 5 repeats x 10 masks of the training bags), and three
`.mat` files (features, bag of each instance, class of each bag). A set is checked against its known
counts, and copies of one against each other.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Bool, Float, Int

from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

logger = logging.getLogger(__name__)

# bags, positive bags, instances, features
COUNTS = {
    "musk1": (92, 47, 476, 166),
    "musk2": (102, 39, 6598, 166),
    "fox": (200, 100, 1320, 230),
    "tiger": (200, 100, 1220, 230),
    "elephant": (200, 100, 1391, 230),
}
FILES = {name: (f"{name.capitalize()}.jld", f"{name}.data", f"{name}_X.mat") for name in COUNTS}


@dataclass(frozen=True)
class ClassicSet:
    """B bags with a class each.

    Attributes:
        name: key of COUNTS.
        bags: (n, D) float32 each.
        targets: (B,), 1 is positive.
        folds: (repeats, folds, B) test masks that came with the file, or None.
    """

    name: str
    bags: tuple[Float[np.ndarray, "_ d"], ...]
    targets: Int[np.ndarray, " b"]
    folds: Bool[np.ndarray, "r k b"] | None = None

    def counts(self) -> tuple[int, int, int, int]:
        """As in COUNTS."""
        bags, positive = len(self.bags), int(self.targets.sum())
        return bags, positive, sum(map(len, self.bags)), self.bags[0].shape[1]

    def digest(self) -> str:
        """Fingerprint of bags and classes, in order."""
        bags = (bag.astype("<f4").tobytes() for bag in self.bags)
        return sha256_bytes(*bags, self.targets.astype("<i8").tobytes())


def read_data(path: Path, name: str) -> ClassicSet:
    """UCI's form; bags in the order of their first line."""
    bags: dict[str, list[list[float]]] = {}
    labels: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            for row in filter(None, csv.reader(stream)):
                *values, label = (float(value) for value in row[2:])
                bags.setdefault(row[0], []).append(values)
                labels[row[0]] = int(label)
        arrays = tuple(np.array(rows, np.float32) for rows in bags.values())
        return ClassicSet(name, arrays, np.array(list(labels.values())))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected lines 'bag,instance,features ...,label', found {error}"
        ) from None


def read_jld(path: Path, name: str) -> ClassicSet:
    """Julia's HDF5: arrays behind references, stored (D, n), masks packed into 64-bit words."""
    try:
        with h5py.File(path, "r") as file:
            bags = tuple(
                np.ascontiguousarray(file[ref][()].T, dtype=np.float32) for ref in file["X"][()]
            )
            targets = _read_bits(file, file["y"][()]).astype(np.int64)
            repeats = [file[repeat][()] for repeat in file["folds"][()]]
            train = np.array(
                [[_read_bits(file, file[ref][()]) for ref in refs] for refs in repeats]
            )
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{path}: expected a .jld of MIL bags (X, y, folds), found {error}"
        ) from None
    return ClassicSet(name, bags, targets, ~train)


def _read_bits(file: h5py.File, value: Any) -> Bool[np.ndarray, " n"]:
    """A BitArray: `chunks_` refers to 64-bit words, lowest bit first; `len_` bits count."""
    words = file[value["chunks_"]][()].astype("<u8").view(np.uint8)
    return np.unpackbits(words, bitorder="little")[: int(value["len_"])].astype(bool)


def read_mat(path: Path, name: str) -> ClassicSet:
    """`<name>_X.mat` (features) with `<name>_Bag2.mat` (bag of each instance) and `<name>_BagI.mat`
    (class of each bag).
    """
    from scipy.io import loadmat  # a while to load

    values = []
    for part, variable in (("X", "X"), ("Bag2", "Bag2"), ("BagI", "bagI")):
        file = path.with_name(f"{name}_{part}.mat")
        try:
            values.append(np.asarray(loadmat(file)[variable]))
        except (OSError, KeyError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{file}: expected a MATLAB file with '{variable}', found {error}"
            ) from None
    features, bag, labels = values[0].astype(np.float32), values[1].ravel(), values[2].ravel()
    numbers = np.unique(bag)
    if len(bag) != len(features) or len(numbers) != len(labels):
        raise UserError(
            f"{path}: expected a bag for each of {len(features)} instances and a class for each "
            f"bag, found {len(bag)} and {len(labels)} for {len(numbers)} bags"
        )
    bags = tuple(features[bag == number] for number in numbers)
    return ClassicSet(name, bags, labels.astype(np.int64))


READERS = {".jld": read_jld, ".data": read_data, ".mat": read_mat}


def load_set(folder: str | Path, name: str) -> ClassicSet:
    """A set from a folder: the `.jld` where it is there (it has folds), checked against the other
    copies.

    Raises:
        UserError: no copy, a copy that cannot be read, other counts than the known ones, copies
            that differ.
    """
    paths = [Path(folder) / file for file in FILES[name] if (Path(folder) / file).is_file()]
    if not paths:
        raise UserError(
            f"{folder}: expected one of {', '.join(FILES[name])}, found none; set folder="
        )
    first, *others = (READERS[path.suffix](path, name) for path in paths)
    for path, found in zip(paths, (first, *others), strict=True):
        if found.counts() != COUNTS[name]:
            raise UserError(
                f"{path}: expected bags, positive bags, instances, features {COUNTS[name]}, found "
                f"{found.counts()}"
            )
    for path, other in zip(paths[1:], others, strict=True):
        if make_bag_set(other) != make_bag_set(first):
            raise UserError(
                f"{path}: expected the bags of {paths[0].name}, found others; remove the wrong copy"
            )
        logger.info("%s: %s and %s hold the same bags", name, paths[0].name, path.name)
    if first.folds is not None:
        check_folds(first.folds, f"{paths[0]}")
    return first


def make_bag_set(classic: ClassicSet) -> list[tuple[str, int]]:
    """The bags without their order and that of their instances."""
    rows = (sorted(row.astype("<f4").tobytes() for row in bag) for bag in classic.bags)
    return sorted(
        (sha256_bytes(*row), int(target)) for row, target in zip(rows, classic.targets, strict=True)
    )


def make_folds(
    classic: ClassicSet, repeats: int, folds: int, seed: int
) -> Bool[np.ndarray, "r k b"]:
    """Test masks: those of the file where they are there and as many, else stratified folds drawn
    anew for every repeat.
    """
    stored = classic.folds
    if stored is not None and stored.shape[1] == folds and len(stored) >= repeats:
        return stored[:repeats]
    from sklearn.model_selection import StratifiedKFold  # a while to load

    masks = np.zeros((repeats, folds, len(classic.bags)), dtype=bool)
    for repeat in range(repeats):
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        for fold, (_, test) in enumerate(splitter.split(classic.targets, classic.targets)):
            masks[repeat, fold, test] = True
    return masks


def check_folds(masks: Bool[np.ndarray, "r k b"], source: str) -> None:
    """Every bag is tested once a repeat.

    Raises:
        UserError: a bag is in two test folds of a repeat, or in none.
    """
    times = masks.sum(1)
    if (times != 1).any():
        repeat, bag = np.argwhere(times != 1)[0]
        raise UserError(
            f"{source}: expected every bag in one test fold of a repeat, found bag {bag} in "
            f"{times[repeat, bag]}"
        )
