"""Pairs straight from slides: a slide's tiles, matched by their corners with its teacher bag,
chosen, cut and encoded.

The tile is what extraction gives the student: read at its geometry, not resized further. A tile
folder's own JPEGs are copied, as in `mil.datasets.distillation_set`, whose names (`<row>_<col>` for
such tiles, else `<x>_<y>`) and JPEG settings are kept, so that the same tiles give the same bytes
on either road.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from detection_kd.datasets.packed_pairs import PackWriter
from patch_encoder.bags.bag import Bag, open_bag, read_bag
from patch_encoder.slides import Slide, open_slide
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, read_coordinates
from patch_encoder.tiles.grid import read_tile
from wsi_common.errors import UserError
from wsi_common.files import read_json
from wsi_common.provenance import differences

JPEG_QUALITY = 95
READ_BY = ("patch_size", "patch_level", "target_size")  # what two geometries have to agree in
Ranking = Mapping[tuple[int, int], float]  # corner -> score


@dataclass(frozen=True)
class PairCutJob:
    """One slide: where it, its coordinates (None: the bag's own) and its teacher bag lie, and which
    tiles are wanted.

    Attributes:
        count: tiles to keep; 0: all.
        ranking: scores of its tiles; None: tiles are drawn at random.
        encoding: jpeg or png, of tiles that are not copied.
    """

    slide_id: str
    slide: Path
    mpp: float | None
    coords: Path | None
    bag: Path
    count: int
    seed: int
    ranking: Ranking | None
    encoding: str
    dtype: str
    part: Path


@dataclass(frozen=True)
class MatchedTiles:
    """Tiles that coordinates and bag have in common: corners (N, 2), their rows in the bag, and
    what only one side has.
    """

    corners: Int[np.ndarray, "n 2"]
    rows: Int[np.ndarray, " n"]
    without_feature: list[tuple[int, int]]
    without_tile: list[tuple[int, int]]


def match_tiles(bag: Bag, coordinates: Coordinates | None) -> tuple[MatchedTiles, TileGeometry]:
    """Match a bag's rows with tiles by their corners, in the order of the bag.

    Raises:
        UserError: neither has corners, tiles that are read otherwise than the bag's, lengths that
            differ where the bag has no corners, or no tile in common.
    """
    rows = np.arange(len(bag))
    if bag.coords is None:
        if coordinates is None or len(coordinates.coords) != len(rows):
            found = (
                "none"
                if coordinates is None
                else f"{len(coordinates.coords)} tiles for {len(rows)} features"
            )
            raise UserError(
                f"{bag.path}: a bag without corners: expected coordinates of the same length, "
                f"found {found}"
            )
        return MatchedTiles(coordinates.coords, rows, [], []), coordinates.geometry
    own = (
        TileGeometry.from_attributes(bag.attributes, str(bag.path))
        if "patch_size" in bag.attributes
        else None
    )
    corners = bag.coords.numpy()
    if coordinates is None:
        if own is None:
            raise UserError(
                f"{bag.path}: expected the tile geometry in the bag's attributes, found none; give "
                "coords="
            )
        return MatchedTiles(corners, rows, [], []), own
    geometry = coordinates.geometry
    changed = [
        name
        for name in READ_BY
        if own is not None and getattr(own, name) != getattr(geometry, name)
    ]
    if changed:
        said = ", ".join(
            f"{name} {getattr(own, name)} -> {getattr(geometry, name)}" for name in changed
        )
        raise UserError(
            f"{bag.path}: features of other tiles than the coordinates': {said}; extract the slide "
            "again"
        )
    tiles, encoded = (
        {(int(x), int(y)): None for x, y in places} for places in (coordinates.coords, corners)
    )
    kept = np.array([(int(x), int(y)) in tiles for x, y in corners], dtype=bool)
    if not kept.any():
        raise UserError(
            f"{bag.path}: expected the corners of the tiles, found none in common; extract the "
            "slide again"
        )
    lost, strange = (
        [corner for corner in one if corner not in other]
        for one, other in ((tiles, encoded), (encoded, tiles))
    )
    return MatchedTiles(corners[kept], rows[kept], lost, strange), geometry


def choose_tiles(job: PairCutJob, matched: MatchedTiles) -> Int[np.ndarray, " m"]:
    """Which of the matched tiles are kept: all in order, the highest of the ranking, or so many at
    random in order.

    Raises:
        UserError: the ranking knows none of the slide's tiles.
    """
    total = len(matched.rows)
    if job.ranking is not None:
        scores = [job.ranking.get((int(x), int(y)), -np.inf) for x, y in matched.corners]
        order = np.argsort(-np.array(scores), kind="stable")
        order = order[np.isfinite(np.array(scores)[order])]
        if not len(order):
            raise UserError(
                f"slide {job.slide_id}: expected tiles of the ranking, found none of {total}"
            )
        return order[: job.count or None]
    if not job.count or job.count >= total:
        return np.arange(total)
    drawn = np.random.default_rng((job.seed, zlib.crc32(job.slide_id.encode()))).permutation(total)
    return np.sort(drawn[: job.count])


def encode_tile(
    slide: Slide, geometry: TileGeometry, x: int, y: int, encoding: str
) -> tuple[str, bytes]:
    """File name and bytes of one tile; a tile folder's own JPEG as it is."""
    if isinstance(slide, TileFolder) and {geometry.patch_size, geometry.target_size} == {
        slide.tile_side
    }:
        file = slide.tile_at(x, y)
        if file is not None and file.suffix.lower() in {".jpg", ".jpeg"}:
            return f"{file.stem}.jpg", file.read_bytes()
        name = f"{x}_{y}" if file is None else file.stem
    else:
        name = f"{x}_{y}"
    image, buffer = Image.fromarray(read_tile(slide, geometry, x, y)), io.BytesIO()
    if encoding == "png":
        image.save(buffer, "PNG")
        return f"{name}.png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"{name}.jpg", buffer.getvalue()


def cut_slide(job: PairCutJob, provenance: Mapping[str, Any]) -> None:
    """Write a slide's pairs as a packed set of its own, with what did not match in its provenance.

    Raises:
        UserError: slide, coordinates or bag that cannot be used.
    """
    bag = read_bag(job.bag)
    features = bag.read().numpy()
    coordinates = read_coordinates(job.coords) if job.coords else None
    matched, geometry = match_tiles(bag, coordinates)
    with (
        open_slide(job.slide, job.mpp, geometry.tile_pattern) as slide,
        PackWriter(job.part, job.dtype) as writer,
    ):
        for index in choose_tiles(job, matched):
            x, y = matched.corners[index].tolist()
            name, picture = encode_tile(slide, geometry, x, y, job.encoding)
            writer.append(job.slide_id, name, picture, features[matched.rows[index]], (x, y))
        lists = asdict(matched)
        mismatches = {kind: lists[kind] for kind in ("without_feature", "without_tile")}
        writer.finish({**provenance, "mismatches": mismatches, "tile_geometry": asdict(geometry)})


def read_ranking(path: str | Path) -> dict[str, Ranking]:
    """Slide id -> scores of its tiles, of a table `slide_id,x,y,score` or of the `ann.json` that
    rank_patches leaves.

    Raises:
        UserError: neither of them.
    """
    import pandas as pd  # a while to load

    path = Path(path)
    try:
        if path.suffix == ".json":
            entries = read_json(path, "a ranking of tiles")["images"]
        else:
            entries = pd.read_csv(path, dtype={"slide_id": str}).to_dict("records")
        rows = [
            (str(e["slide_id"]), (int(e["x"]), int(e["y"])), float(e["score"])) for e in entries
        ]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: expected a ranking (csv with slide_id,x,y,score, or rank_patches' "
            f"ann.json), cannot be read: {error!r}"
        ) from None
    if not rows or not np.isfinite([score for *_, score in rows]).all():
        raise UserError(
            f"{path}: expected finite scores of tiles, found "
            f"{'NaN or infinity' if rows else 'none'}"
        )
    found: dict[str, dict[tuple[int, int], float]] = {}
    for slide_id, corner, score in rows:
        found.setdefault(slide_id, {})[corner] = score
    return dict(found)


def read_features(bag: Path) -> tuple[str, dict[str, str]]:
    """(dtype on disk, encoder provenance) of a bag."""
    attributes = open_bag(bag).attributes if bag.suffix == ".h5" else {}
    names = ("encoder", "weights_sha256", "transform", "precision")
    return str(attributes.get("dtype", "float32")), {
        name: str(attributes[name]) for name in names if name in attributes
    }


def check_one_teacher(jobs: Sequence[PairCutJob]) -> dict[str, str]:
    """The encoder that made all bags, {} where they do not say.

    Raises:
        UserError: bags of several encoders.
    """
    found = {job.slide_id: read_features(job.bag)[1] for job in jobs}
    first = jobs[0].slide_id
    for slide_id, encoder in found.items():
        if encoder != found[first]:
            changed = differences(found[first], encoder)
            raise UserError(
                f"expected bags of one teacher, found two: slides {first} and {slide_id} differ "
                f"in {changed}"
            )
    return found[first]
