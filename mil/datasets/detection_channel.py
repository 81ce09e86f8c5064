"""Feature bags with two more columns a tile: highest confidence and number of the detections whose
centre lies in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import __version__
from common.errors import UserError
from common.files import sha256_file
from common.provenance import can_reuse
from mil.datasets.detections import SlideDetections, make_tile_channels
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.tiles.coordinates import TileGeometry

CHANNELS = "detection_max,detection_count"


def write_channel(
    source: Path, target: Path, found: SlideDetections, detections: Path, *, overwrite: bool = False
) -> bool:
    """Write one slide's bag with the channels appended; False when it is there already.

    Args:
        source: the bag, with coords and their tile size.
        target: the new bag.
        found: the slide's detections, in level-0 px as the coords.
        detections: their file, for the provenance.

    Raises:
        UserError: a bag without coords or tile size; a target of other inputs, unless `overwrite`.
    """
    own = {
        "source_sha256": open_bag(source).digest(),
        "detections_sha256": sha256_file(detections),
        "channels": CHANNELS,
    }

    def recorded() -> dict[str, Any]:
        found_there = open_bag(target).provenance
        return {name: value for name, value in found_there.items() if name in own}

    if can_reuse(target, recorded, own, "a bag of other inputs", overwrite=overwrite):
        return False
    bag = read_bag(source)
    if bag.coords is None:
        raise UserError(
            f"{source}: expected coords beside the features, found none; detections cannot be "
            "laid on its tiles"
        )
    side = TileGeometry.from_attributes(bag.tiling, str(source)).patch_size_level0
    channels = torch.from_numpy(make_tile_channels(found, bag.coords.numpy(), side))
    features = torch.cat([bag.read(), channels], dim=1)
    encoder = bag.provenance.get("encoder", source.parent.parent.name)
    changed = {"encoder": f"{encoder}+detections", "software_version": __version__}
    write_bag(target, features, bag.coords, bag.tiling, bag.provenance | own | changed)
    return True


def write_channels(
    bags: Mapping[str, Path],
    found: Mapping[str, SlideDetections],
    files: Mapping[str, Path],
    folder: Path,
    overwrite: bool,
) -> int:
    """`<folder>/h5_files/<slide_id>.h5` for every slide; how many were written."""
    targets = {slide: folder / "h5_files" / f"{slide}.h5" for slide in bags}
    return sum(
        write_channel(bags[s], targets[s], found[s], files[s], overwrite=overwrite) for s in bags
    )
