"""TUPAC16's auxiliary set and its alternative labels: a table of rows and columns per region.

Source: Veta et al., "Predicting breast tumor proliferation from whole-slide images: the TUPAC16
challenge" (Medical Image Analysis 2019), and Bertram et al., "Are pathologist-defined labels
reproducible?" (2020), whose labels add look-alikes. `mitoses_ground_truth/<case>/<region>.csv`
holds `row,column` per line without a header. A region without file, or with an empty one, has no
mitotic figure; the images say which regions there are. Cases are 01 to 73, with both digits.
"""

from __future__ import annotations

from pathlib import Path

from detection_kd.mitosis_sets.bare_tables import read_cells
from detection_kd.mitosis_sets.checked_fields import make_field
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS, AnnotatedField
from wsi_common.errors import UserError

MITOSES, LOOK_ALIKES = "mitoses_ground_truth", "nonmitoses_ground_truth"
MPP = 0.25
SCANNERS = ("Aperio ScanScope XT", "Leica SCN400")
LAST_OF_FIRST = 23
"""Cases 1 to 23 are of the AMIDA13 challenge, from another scanner than the later ones."""
Region = tuple[str, str]


def read_tupac16(annotations: Path, images: Path | None, first_index: int) -> list[AnnotatedField]:
    """One field per region, `<case>_<region>`.

    Args:
        annotations: folder with `mitoses_ground_truth` (and `nonmitoses_ground_truth`), or the
            former itself.
        images: folder of the images `<case>/<region>.tif`, at any depth; without, regions are those
            that have a table.
        first_index: index of the first row and column: the original labels count from 1, the
            alternative ones from 0.

    Raises:
        UserError: no tables there, a table without its image, or one that cannot be read.
    """
    folder = annotations if annotations.name == MITOSES else annotations / MITOSES
    if not folder.is_dir():
        raise UserError(f"{annotations}: expected a folder {MITOSES}, found none")
    mitoses = _find_regions(folder, (".csv",))
    others = _find_regions(folder.with_name(LOOK_ALIKES), (".csv",))
    tables = mitoses.keys() | others.keys()
    pictures = {} if images is None else _find_regions(images, (".tif", ".tiff", ".png", ".jpg"))
    lost = [] if images is None else sorted(tables - pictures.keys())
    if lost:
        case, region = lost[0]
        raise UserError(
            f"{images}: expected an image of every table, found none of {case}/{region} "
            f"({len(lost)} of {len(tables)})"
        )
    fields = []
    for case, region in sorted(pictures.keys() or tables):
        place = case, region
        files = {MITOSIS: mitoses.get(place), LOOK_ALIKE: others.get(place)}
        fields.append(
            make_field(
                str(folder),
                f"{case}_{region}",
                pictures.get(place, Path(case, f"{region}.tif")),
                *read_cells(files, first_index, row_first=True),
                case=case,
                scanner=SCANNERS[int(case) > LAST_OF_FIRST],
                mpp=MPP,
                look_alikes=bool(others),
            )
        )
    return fields


def _find_regions(folder: Path, suffixes: tuple[str, ...]) -> dict[Region, Path]:
    """(case, region) -> file, of the files `<case>/<region>.*` at any depth.

    Raises:
        UserError: two of one region.
    """
    found: dict[Region, Path] = {}
    for path in sorted(folder.rglob("*/*")):
        if path.suffix.lower() in suffixes and path.parent.name.isdecimal():
            region = f"{int(path.parent.name):02d}", path.stem
            if region in found:
                raise UserError(
                    f"{folder}: expected one file of {'/'.join(region)}, found {found[region]} and "
                    f"{path}"
                )
            found[region] = path
    return found
