"""Write the tiles of slides as picture files with a COCO list of them, so that a detector of any
other software can be run on them; `merge_detections` puts its results together.

    python -m detection_kd.cut_tiles slides=cohort/slides coords=tiles output=runs/cut_tiles

Writes `<output>/<slide_id>/<x>_<y>.jpg` (x and y in level-0 px), `<output>/lists/<slide_id>.json`,
`<output>/tiles.json` (COCO `images` with `slide_id`, `x`, `y`) and `failures.csv`. A slide is the
unit of resuming.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from detection_kd.whole_slides.tile_pass import find_in_slides, find_unfinished, to_tensor
from detection_kd.whole_slides.tile_pictures import FORMATS, TileWriter, number_images
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.keys import ExtractionKeys
from patch_encoder.extraction.loop import cohort_jobs
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.files import read_json, write_json

logger = logging.getLogger(__name__)
STAGE = "cut_tiles"


@dataclass
class Config(ExtractionKeys):
    """Keys of the cutting (`precision`, `dtype` and `pt` do not matter here)."""

    picture_format: str = key("jpg", "file format of the tiles", choices=tuple(FORMATS))


def get_pixels(tiles: Tensor, jobs: Sequence[SlideJob]) -> list[np.ndarray]:
    """The tiles of a batch, uint8 (H, W, 3) each."""
    return list(tiles.permute(0, 2, 3, 1).cpu().contiguous().numpy())


def main(config: Config) -> int:
    """Cut every slide that has no list yet; 1 when slides failed."""
    settings, output = config.settings(), Path(config.output)
    failures = Failures(STAGE, settings.shard.name)
    jobs = cohort_jobs(
        config.slides, config.coords, config.labels, failures, settings.shard, settings.selection
    )
    lists = {job.slide_id: output / "lists" / f"{job.slide_id}.json" for job in jobs}
    limits = {"picture_format": config.picture_format}
    wanted = find_unfinished(jobs, limits, {}, settings, lists.__getitem__)
    todo = [job for job in jobs if job.slide_id in wanted]
    logger.info("%s: %d slides, %d already done", STAGE, len(jobs), len(jobs) - len(todo))

    def collect(job: SlideJob) -> TileWriter:
        return TileWriter(job.slide_id, job.coordinates, output, config.picture_format)

    sequence = TileSequence(todo, to_tensor)
    for job, entries in find_in_slides(sequence, get_pixels, collect, settings, failures):
        content = {"info": wanted[job.slide_id], "images": entries}
        write_json(lists[job.slide_id], content)  # last: where it is, the slide is done
        logger.info("%s: %d tiles", job.slide_id, len(entries))
    found = sorted((output / "lists").glob("[!.]*.json"))
    documents = [read_json(path, "the list of a slide's tiles")["images"] for path in found]
    images = number_images(documents)
    write_json(output / "tiles.json", {"images": images, "annotations": [], "categories": []})
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
