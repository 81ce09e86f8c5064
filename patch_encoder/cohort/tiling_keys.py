"""The configuration keys of tiling, which `tile_slides` and `slides_to_features` share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from patch_encoder.cohort.keys import TileGridKeys
from patch_encoder.cohort.tiling import TilingSettings
from patch_encoder.tissue.clam import resolve_parameters
from patch_encoder.tissue.find import METHODS
from patch_encoder.tissue.quality import Cuts, check_shares
from patch_encoder.tissue.settings import TissueSettings
from wsi_common.config import group, key
from wsi_common.errors import UserError
from wsi_common.processes.pool import pick_workers

# how and where slides are found and read, which is no part of what decides a slide's tiles
FREE = {"slides", "slides_list", "suffixes", "labels", "workers", "threads", "read_timeout"}
FREE |= {"overwrite", "pictures"}


@dataclass
class TilingKeys(Cuts, TileGridKeys):
    """What decides the tiles of a slide, and how the slides are worked on."""

    step: int | None = key(None, "px at target_mpp from tile to tile, instead of an overlap")
    pad: bool = key(False, "also tiles that run past the right and lower border, white there")
    min_tissue: float = key(0.1, "smallest share of a tile that has to be tissue")
    method: str = key(
        "auto",
        "tissue detection; auto: existing tiles of a tile folder, else hsv_otsu",
        choices=METHODS,
    )
    grid: str = key(
        "slide",
        "one grid over the slide, or CLAM's grid per contour (method=clam)",
        choices=("slide", "contour"),
    )
    quality: bool = key(
        False, "measure sharpness, ink, background and stain of every tile (reads every tile)"
    )
    max_unreadable: float = key(
        0.25, "largest share of a slide that may fail to decode; the rest is tiled"
    )
    tissue: TissueSettings = group(TissueSettings, "tissue detection settings")
    threads: int = key(
        0,
        "CPU threads per process; that read a slide; 0: as many as there are cores for "
        "each of the workers",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)

    def tiling(self, output: str | Path) -> TilingSettings:
        """What the tiling loop needs of these keys.

        Args:
            output: folder of the tiles.

        Raises:
            UserError: keys that do not go together.
        """
        self.check_tiling()
        decisive = ("overlap", "step", "pad", "min_tissue", "method", "grid", "tissue", "quality")
        options: dict[str, Any] = {name: getattr(self, name) for name in decisive}
        options |= {"tile_size": self.tile_size, "target_mpp": self.target_mpp}
        options |= {"max_unreadable": self.max_unreadable}
        options["cuts"] = Cuts(**{field.name: getattr(self, field.name) for field in fields(Cuts)})
        return TilingSettings(
            options,
            self.stamp(),
            Path(output),
            self.mpp,
            self.tile_pattern,
            pick_workers(self.workers, self.read_timeout),
            self.threads,
            self.read_timeout,
            self.overwrite,
        )

    def stamp(self) -> str:
        """The settings that decide a slide's tiles, as stored in its coordinates file."""
        own = {field.name for field in fields(TilingKeys)} - FREE
        stamp = {name: value for name, value in asdict(self).items() if name in own}
        del stamp["tissue"]["file"]["folder"]  # what lies in it counts, not where it lies
        return json.dumps(stamp, sort_keys=True)

    def check_tiling(self) -> None:
        """Refuse what does not go together before any slide is opened."""
        check_shares({name: getattr(self, name) for name in ("min_tissue", "max_unreadable")})
        check_shares(self.limits())
        if self.limits() and not self.quality:
            raise UserError(
                "min_blur, max_pen, ...: expected quality=true, found false; cuts need measured "
                "tiles"
            )
        if self.grid == "contour" and self.method != "clam":
            raise UserError(
                f"grid=contour: expected method=clam, found method={self.method}; only CLAM has "
                "contours to start from"
            )
        if self.method == "file" and not self.tissue.file.folder:
            raise UserError(
                "method=file: expected tissue.file.folder=<folder of annotations>, found none"
            )
        mthresh = resolve_parameters(self.tissue.clam).mthresh
        if self.method == "clam" and (mthresh < 1 or mthresh % 2 == 0):
            raise UserError(
                f"tissue.clam.mthresh={mthresh}: expected an odd side of the median filter; take "
                f"{mthresh + 1}"
            )
