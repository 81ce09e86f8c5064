"""Finds the files of feature bags, and of coordinates for bags that store none (`.pt`, TS2G-KD's).

Coordinates are `<slide_id>.h5` (TRIDENT: `<slide_id>_patches.h5`) as tile_slides writes it, or a
bag with coordinates, in a folder that the user names or in `h5_files/` beside the bag's own folder,
where CLAM and extract_features leave it.
"""

from __future__ import annotations

from pathlib import Path

from wsi_common.errors import UserError

FOLDERS = ("h5_files", "pt_files", "pt", "")


def list_bags(folder: str | Path) -> dict[str, Path]:
    """Slide id -> bag file, for `<features>/<encoder>` or one of its sub-folders; `.h5` wins over
    `.pt`.

    Raises:
        UserError: no bag there.
    """
    folder = Path(folder)
    for name in FOLDERS:
        for suffix in (".h5", ".pt"):
            found = {
                file.stem: file
                for file in sorted((folder / name).glob(f"*{suffix}"))
                if not file.name.startswith(".")
            }
            if found:
                return found
    raise UserError(
        f"{folder}: expected feature bags (h5_files/<slide>.h5 or pt_files/<slide>.pt), found none"
    )


def find_coordinates(bag_file: Path, folder: str | Path = "") -> Path | None:
    """Find the coordinates of a bag that stores none: in `folder`, else beside it, or None."""
    beside = (bag_file.parent.parent / "h5_files", bag_file.parent / "h5_files")
    folders = (Path(folder),) if folder else beside
    names = (f"{bag_file.stem}.h5", f"{bag_file.stem}_patches.h5")
    candidates = (place / name for place in folders for name in names)
    return next((path for path in candidates if path.is_file() and path != bag_file), None)
