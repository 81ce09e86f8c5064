"""The preview of stain normalisation: one page with a row per tile."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from patch_encoder.slides import SlideError
from patch_encoder.stain_preview import COLUMNS, GAP, HEAD, LABEL, Config, main
from tests.patch_encoder.stain.stain_fixture import draw_tile
from wsi_common.errors import UserError

SIDE = 64


def test_the_page_has_a_row_for_each_tile_of_the_pictures_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.fromarray(draw_tile().permute(1, 2, 0).numpy()).save(tmp_path / "slide.png")
    page = tmp_path / "page.png"
    main(Config(slides=str(tmp_path), output=str(page), rows=4, tile_size=SIDE))
    with Image.open(page) as image:
        assert image.size == (
            GAP + (SIDE + GAP) * len(COLUMNS),
            HEAD + (SIDE + GAP + LABEL) * 2,  # half of the rows are the broken picture's
        )
    with pytest.raises(SlideError):
        main(Config(slides=str(tmp_path / "broken.png"), output=str(page)))


@pytest.mark.parametrize("name", ["rows", "tile_size"])
def test_a_page_without_rows_or_pixels_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0: expected at least 1"):
        main(Config(slides=str(tmp_path), output=str(tmp_path / "page.png"), **{name: 0}))
