"""Which slides of a cohort are taken: those of a list, and those of some file types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from patch_encoder.cohort.labels import read_rows
from patch_encoder.slides.names import DICOM_SUFFIX, PICTURE_SUFFIXES, SLIDE_SUFFIXES, strip_suffix
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import safe_id


@dataclass(frozen=True)
class Selection:
    """The slides that are taken; by default all of them.

    Attributes:
        names: slide id -> the file names that a list gives for it, which decide between several
            files of one id; empty: no list.
        suffixes: endings of the files, in lower case; empty: any. Tile folders have none, a DICOM
            folder has `.dcm`.
    """

    names: Mapping[str, frozenset[str]] = field(default_factory=dict)
    suffixes: frozenset[str] = frozenset()

    def takes_id(self, slide_id: str) -> bool:
        """Whether the list names the slide, or there is no list."""
        return not self.names or slide_id in self.names

    def takes_file(self, path: Path) -> bool:
        """Whether the file or folder is of a kind that is taken."""
        if not self.suffixes:
            return True
        if path.is_dir():
            holds_dicom = any(file.suffix.lower() == DICOM_SUFFIX for file in path.iterdir())
            return holds_dicom and DICOM_SUFFIX in self.suffixes
        return path.name.lower().endswith(tuple(self.suffixes))

    def choose(self, paths: Sequence[Path], slide_id: str) -> list[Path]:
        """Of several files of one id, those that the list names; all where it names none."""
        named = [path for path in paths if path.name in self.names.get(slide_id, ())]
        return named or list(paths)


def read_selection(slides_list: str, suffixes: Sequence[str]) -> Selection:
    """The selection of the keys `slides_list` and `suffixes`; both may be empty.

    Args:
        slides_list: text file with one slide id or file name per line (blank lines and lines that
            start with # are passed over), or a table with a slide_id column.
        suffixes: endings of slide files or pictures, with or without their dot.

    Raises:
        UserError: a list without slides, text in another encoding, no ending of slides.
    """
    endings = {f".{suffix.lower().removeprefix('.')}" for suffix in suffixes}
    known = SLIDE_SUFFIXES | PICTURE_SUFFIXES
    for unknown in sorted(endings - known):
        raise UserError(
            f"suffixes: expected endings of slides or pictures, found '{unknown}'; "
            f"{did_you_mean(unknown, known)}"
        )
    names: dict[str, frozenset[str]] = {}
    for name in _read_names(Path(slides_list)) if slides_list else ():
        slide_id = safe_id(strip_suffix(name))
        names[slide_id] = names.get(slide_id, frozenset()) | {name}
    return Selection(names, frozenset(endings))


def _read_names(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"slides_list={path}: expected a text file in UTF-8, cannot be read: {error}"
        ) from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(
            f"slides_list={path}: expected one slide id or file name per line, found none"
        )
    if "slide_id" in [cell.strip() for cell in lines[0].split(",")]:
        lines = [row["slide_id"] for _, row in read_rows(path, ("slide_id",)) if row["slide_id"]]
    return [PurePath(line).name for line in lines]
