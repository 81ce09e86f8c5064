"""Everything between a slide and its features: slides, tissue, tiles, encoders, feature bags.

In Python, the same functions that the scripts call:

    from patch_encoder import encode_tiles, load_encoder, open_slide, read_bag, tile_slide

    encoder = load_encoder("uni2_h")
    with open_slide("S001.svs") as slide:
        tiles = tile_slide(slide, encoder.tile_size, encoder.target_mpp)
        bag = encode_tiles(encoder, slide, tiles.coordinates)

They are loaded when they are first used (PEP 562): a worker that imports the package does not wait.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch_encoder.bags.bag import read_bag
    from patch_encoder.extraction.slide_features import encode_tiles
    from patch_encoder.models.encoders import build_encoder as load_encoder
    from patch_encoder.slides import open_slide
    from patch_encoder.tissue.slide_tiles import tile_slide

__all__ = ["encode_tiles", "load_encoder", "open_slide", "read_bag", "tile_slide"]
_PLACES = {
    "encode_tiles": ("patch_encoder.extraction.slide_features", "encode_tiles"),
    "load_encoder": ("patch_encoder.models.encoders", "build_encoder"),
    "open_slide": ("patch_encoder.slides", "open_slide"),
    "read_bag": ("patch_encoder.bags.bag", "read_bag"),
    "tile_slide": ("patch_encoder.tissue.slide_tiles", "tile_slide"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
