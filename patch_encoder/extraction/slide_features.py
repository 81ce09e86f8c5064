"""The tiles of one slide as a feature bag in memory, by the function that extraction runs over a
cohort.
"""

from __future__ import annotations

from patch_encoder.bags.bag import Bag
from patch_encoder.extraction.bag_targets import BagMemory
from patch_encoder.extraction.loop import ExtractSettings, encode_into
from patch_encoder.extraction.network import has_weights
from patch_encoder.models.encoders import Encoder
from patch_encoder.slides.base import Slide, SlideError
from patch_encoder.stain.normaliser import Normaliser
from patch_encoder.tiles.coordinates import Coordinates, SlideJob
from wsi_common.device import pick_device, pick_precision
from wsi_common.errors import UserError
from wsi_common.processes.pool import pick_workers


def encode_tiles(
    encoder: Encoder,
    slide: Slide,
    coordinates: Coordinates,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    stain: Normaliser | None = None,
) -> Bag:
    """Features (N, D) of the tiles of a slide, float32, in a bag that is in no file.

    Args:
        encoder: as `load_encoder` makes it.
        slide: an open slide; the workers open it anew.
        coordinates: its tiles, as `tile_slide(...).coordinates` or `read_coordinates` gives them.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32, bf16 or fp16; auto: bf16 where the device has it in hardware.
        batch_size: tiles per batch.
        workers: processes that decode tiles; None: one per core, at most 8; 0: this one.
        stain: stain normalisation of the tiles, as `build_normaliser` makes it; None: none.

    Raises:
        UserError: there is no tile to encode.
        SlideError: a tile cannot be read, or the encoder gives NaN or infinity.
    """
    if len(coordinates.coords) == 0:
        raise UserError(
            f"slide {slide.slide_id}: expected tiles to encode, found none; loosen the settings of "
            "tissue detection"
        )
    place = pick_device(device)
    number = "fp32" if not has_weights(encoder.model) else pick_precision(precision, place)
    settings = ExtractSettings(place, number, batch_size, pick_workers(workers), stain=stain)
    job = SlideJob(slide.slide_id, slide.path, coordinates, slide.mpp)
    memory = BagMemory()
    report = encode_into(memory, [job], encoder, settings, show=False)
    if report.failures:
        raise SlideError(f"slide {slide.slide_id}: {report.failures[0]['error']}")
    return memory.bags[slide.slide_id]
