"""Settings of tissue detection as configuration keys; lengths in um, areas in um^2."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_common.config import group, key

INKS = ("blue", "green", "red", "black")


@dataclass
class ClamSettings:
    """CLAM's parameters under CLAM's names and units; see patch_encoder.tissue.clam."""

    preset: str = key(
        "",
        "CLAM's values; empty: its defaults",
        choices=("", "bwh_biopsy", "bwh_resection", "tcga"),
    )
    seg_downsample: float = key(
        64.0, "the mask is made on the pyramid level nearest below this downsample"
    )
    seg_level: int = key(-1, "pyramid level of the mask; -1: from seg_downsample")
    sthresh: int | None = key(
        None, "saturation (0..255) above which a pixel is tissue; null: the preset's"
    )
    mthresh: int | None = key(
        None, "side of the median filter on saturation, px of the level, odd; null: the preset's"
    )
    close: int | None = key(None, "side of the closing, px of the level; null: the preset's")
    use_otsu: bool | None = key(None, "Otsu's threshold instead of sthresh; null: the preset's")
    a_t: float | None = key(
        None,
        "smallest tissue part, in tiles of 512 px at level 0; cells of a smear are smaller; null: "
        "the preset's",
    )
    a_h: float | None = key(
        None, "smallest hole, in tiles of 512 px at level 0; null: the preset's"
    )
    max_n_holes: int | None = key(
        None, "largest holes that are looked at, a tissue part; null: the preset's"
    )
    keep_ids: list[int] = key([], "numbers of the tissue parts to keep; empty: all")
    exclude_ids: list[int] = key([], "numbers of the tissue parts to drop")


@dataclass
class CytologySettings:
    """Thin, scattered cells on glass; see patch_encoder.tissue.cytology."""

    window: float = key(
        1000.0, "side of the window that the local brightness of the glass is taken from, um"
    )
    od: float = key(0.03, "least optical density above the glass of a weakly stained pixel")
    od_core: float = key(0.08, "a part needs a pixel of this optical density, or it is dropped")
    smooth: float = key(4.0, "sigma of the smoothing before the threshold, um")
    line_length: float = key(
        2000.0, "thin straight parts of this length are edges of a coverslip, um; 0: kept"
    )
    line_width: float = key(60.0, "such parts are at most this wide, um")


@dataclass
class FileSettings:
    """Hand-drawn `<folder>/<slide_id>.geojson` or mask; see patch_encoder.tissue.annotation."""

    folder: str = key("", "folder of <slide_id>.geojson|json|png|tif|tiff|bmp|jpg", path=True)
    include: list[str] = key(
        [], "GeoJSON: names of the classes that are tissue; empty: every object"
    )
    exclude: list[str] = key([], "GeoJSON: names of the classes that are cut out of it")


@dataclass
class TissueSettings:
    """All methods read mpp; other keys name their method, or are done after every one."""

    mpp: float = key(8.0, "resolution of the tissue mask, um per pixel (clam: its level's)")
    floor: float = key(0.05, "hsv_otsu: lowest saturation (0..1) that Otsu may choose")
    median: float = key(24.0, "hsv_otsu: side of the median filter on saturation, um")
    closing: float = key(
        16.0, "hsv_otsu, cytology: radius of the closing that joins cells into tissue, um"
    )
    min_area: float = key(2000.0, "smaller parts are dropped, um^2; clam has a_t instead")
    min_hole: float = key(0.0, "smaller holes count as tissue, um^2; 0: every hole is kept")
    inks: list[str] = key(
        ["auto"],
        "inks to drop; auto: all for cytology, else none; [] none",
        choices=("auto", *INKS),
    )
    ink_od: float = key(
        0.3, "optical density from which a colour counts as ink; raise it where cells are dark cyan"
    )
    ink_width: float = key(200.0, "narrower things of that colour are no pen strokes, um")
    bubbles: bool = key(
        False,
        "drop thin closed rings (air bubbles) and thin straight lines (edges of the coverslip)",
    )
    clam: ClamSettings = group(ClamSettings, "method clam")
    cytology: CytologySettings = group(CytologySettings, "method cytology")
    file: FileSettings = group(FileSettings, "method file")
