"""Pairs of a tile and its teacher's feature, read from a folder or a packed file, every one checked
before training.

<root>/wsi_root/<slide>/<patch>.jpg    the tile
<root>/wsi_root/<slide>/<patch>.pt     its teacher feature, float32 (D,)
<root>/ann_root/ann.json               COCO-style list of the images

is what `mil.rank_patches` writes; `pack_distillation` makes one HDF5 file of it. Both give the same
pairs in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection_kd.datasets.packed_pairs import Pack, is_packed
from detection_kd.datasets.pair_problems import Problems, read_header_size, read_picture_size
from wsi_common.checkpoint import load_tensors
from wsi_common.errors import UserError
from wsi_common.files import read_json, safe_id
from wsi_common.progress import progress

PICTURES = (".jpg", ".jpeg", ".png")
HEADER = 8192  # bytes that mostly hold a picture's header


@dataclass(frozen=True)
class Pair:
    """One tile and its teacher feature.

    Attributes:
        slide_id: its slide.
        image: the tile's file; `<pack>/<slide>/<patch>.jpg` for a tile in a packed set.
        feature: float32 (D,).
        pack, row: the packed set and the tile's row in it, else None.
    """

    slide_id: str
    image: Path
    feature: Tensor
    pack: Pack | None = None
    row: int = -1

    def picture(self) -> bytes:
        """The encoded tile."""
        return self.image.read_bytes() if self.pack is None else self.pack.picture(self.row)


def read_pairs(
    source: str | Path,
    *,
    report: Path | None = None,
    verify: bool = False,
    skip_bad: bool = False,
    show: bool = False,
) -> list[Pair]:
    """All pairs of a distillation set, checked before any training.

    Args:
        source: the folder, or the packed file.
        report: table of all problems, written when there are any.
        verify: decode every picture; else only its header is read.
        skip_bad: leave pairs with problems out.
        show: progress.

    Raises:
        UserError: one line with the number of problems by kind and the first of them: picture or
            feature missing or unreadable, not finite, of another width or size than most, twice
            there, not in the list or only there.
    """
    source, problems = Path(source), Problems()
    read = _packed_pairs if is_packed(source) else _folder_pairs
    found = read(source, problems, verify, show)
    kept = _of_one_kind([pair for pair, _ in found], [size for _, size in found], problems)
    problems.settle(source, len(kept), report, skip_bad)
    return kept


def _folder_pairs(
    root: Path, problems: Problems, verify: bool, show: bool
) -> list[tuple[Pair, tuple[int, int]]]:
    listing = read_json(root / "ann_root" / "ann.json", "the list of distillation images")
    if (
        not isinstance(listing, dict)
        or not isinstance(listing.get("images"), list)
        or not listing["images"]
    ):
        raise UserError(
            f"{root}/ann_root/ann.json: expected a COCO-style file with images, found none"
        )
    found, listed = [], set[Path]()
    for entry in progress(
        listing["images"], "checking pairs", len(listing["images"]), "pairs", enabled=show
    ):
        image = _listed_image(root, entry, problems)
        if image is None:
            continue
        if image in listed:
            problems.add(
                image.parent.name, image.stem, "duplicate", f"{image}: listed more than once"
            )
            continue
        listed.add(image)
        pair = _folder_pair(image, entry, problems, verify)
        if pair is not None:
            found.append(pair)
    _unlisted(root / "wsi_root", listed, problems)
    return found


def _listed_image(root: Path, entry: Any, problems: Problems) -> Path | None:
    """Where an entry of the list says that its picture is, below `wsi_root`."""
    name = entry.get("file_name") if isinstance(entry, dict) else None
    try:
        slide_id, patch = str(name).split("/")
        return root / "wsi_root" / safe_id(slide_id) / safe_id(patch, "patch")
    except ValueError:
        problems.add(
            "",
            str(name),
            "bad entry",
            f"ann.json: expected file_name <slide>/<patch>.jpg, found {name!r}",
        )
        return None


def _folder_pair(
    image: Path, entry: Any, problems: Problems, verify: bool
) -> tuple[Pair, tuple[int, int]] | None:
    """The pair of an entry, or None when it is entered in `problems` (picture and feature both
    looked at).
    """
    before = len(problems.found)
    slide_id, patch, size = image.parent.name, image.stem, None
    if not image.is_file():
        problems.add(slide_id, patch, "missing picture", f"{image}: expected a tile, found no file")
    else:
        size = _checked_size(slide_id, image, image, problems, verify)
    said = (entry.get("width"), entry.get("height"))
    if size is not None and None not in said and said != size:
        problems.add(
            slide_id, patch, "listing disagrees", f"{image}: listed with {said} px, found {size}"
        )
    feature = _folder_feature(image.with_suffix(".pt"), problems)
    if size is None or feature is None or len(problems.found) > before:
        return None
    return Pair(slide_id, image, feature), size


def _checked_size(
    slide_id: str, image: Path, picture: Path | bytes, problems: Problems, verify: bool
) -> tuple[int, int] | None:
    try:
        return read_picture_size(picture, verify)
    except ValueError as error:
        detail = f"{image}: expected a tile, cannot be decoded: {error}"
        problems.add(slide_id, image.stem, "undecodable picture", detail)
        return None


def _folder_feature(path: Path, problems: Problems) -> Tensor | None:
    slide_id, patch = path.parent.name, path.stem
    if not path.is_file():
        problems.add(
            slide_id, patch, "missing feature", f"{path}: expected a teacher feature, found no file"
        )
        return None
    try:
        feature = load_tensors(path, "a teacher feature")
    except UserError as error:
        problems.add(slide_id, patch, "unreadable feature", str(error))
        return None
    if (
        not isinstance(feature, Tensor)
        or feature.dim() != 1
        or not len(feature)
        or not feature.is_floating_point()
    ):
        found = (
            f"{feature.dtype} {tuple(feature.shape)}"
            if isinstance(feature, Tensor)
            else type(feature).__name__
        )
        problems.add(
            slide_id,
            patch,
            "unreadable feature",
            f"{path}: expected one vector (D,) of floats, found {found}",
        )
        return None
    if not torch.isfinite(feature).all():
        problems.add(
            slide_id, patch, "not finite", f"{path}: expected finite numbers, found NaN or infinity"
        )
        return None
    return feature.float()


def _unlisted(folder: Path, listed: set[Path], problems: Problems) -> None:
    """Files that the list does not know."""
    names = {image.with_suffix("") for image in listed}
    for file in sorted(folder.glob("*/*")):
        if (
            file.name.startswith(".")
            or file.suffix.lower() not in (*PICTURES, ".pt")
            or file.with_suffix("") in names
        ):
            continue
        alone = file.suffix == ".pt" and not any(
            file.with_suffix(suffix).is_file() for suffix in PICTURES
        )
        kind = "feature without picture" if alone else "not listed"
        problems.add(file.parent.name, file.stem, kind, f"{file}: found, but not in ann.json")


def _packed_pairs(
    path: Path, problems: Problems, verify: bool, show: bool
) -> list[tuple[Pair, tuple[int, int]]]:
    pack = Pack(path)
    if verify and not pack.intact():
        problems.add(
            "",
            "",
            "changed pictures",
            f"{path}: the pictures are not those that were packed; pack the set again",
        )
    finite = torch.isfinite(pack.features).all(dim=1)
    found, seen = [], set[tuple[str, str]]()
    for row in progress(range(len(pack)), "checking pairs", len(pack), "pairs", enabled=show):
        slide_id, name, before = pack.slides[row], pack.names[row], len(problems.found)
        image = path / slide_id / name
        if (slide_id, name) in seen:
            problems.add(slide_id, image.stem, "duplicate", f"{image}: packed more than once")
        seen.add((slide_id, name))
        if not finite[row]:
            problems.add(
                slide_id,
                image.stem,
                "not finite",
                f"{image}: expected a finite feature, found NaN or infinity",
            )
        size = _packed_size(pack, row, image, problems, verify)
        if size is not None and len(problems.found) == before:
            found.append((Pair(slide_id, image, pack.features[row], pack, row), size))
    return found


def _packed_size(
    pack: Pack, row: int, image: Path, problems: Problems, verify: bool
) -> tuple[int, int] | None:
    size = None if verify else read_header_size(pack.picture(row, HEADER))
    return size or _checked_size(pack.slides[row], image, pack.picture(row), problems, verify)


def _of_one_kind(
    pairs: list[Pair], sizes: Sequence[tuple[int, int]], problems: Problems
) -> list[Pair]:
    """The pairs whose width and tile size are those of most; the others are entered in
    `problems`.
    """
    widths = [len(pair.feature) for pair in pairs]
    width, size = (_most_frequent(values) for values in (widths, sizes))
    kept = []
    for pair, own_width, own_size in zip(pairs, widths, sizes):
        add = _adder(problems, pair)
        if own_width != width:
            add(
                "other width",
                f"{pair.image}: expected a feature of width {width} as most have, found "
                f"{own_width}",
            )
        if own_size != size:
            add("other size", f"{pair.image}: expected {size} px as most have, found {own_size}")
        if (own_width, own_size) == (width, size):
            kept.append(pair)
    return kept


def _adder(problems: Problems, pair: Pair) -> Callable[[str, str], None]:
    return lambda kind, detail: problems.add(pair.slide_id, pair.image.stem, kind, detail)


def _most_frequent(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0] if values else None
