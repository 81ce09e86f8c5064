"""What is wrong with a distillation set: every problem of every pair, collected before training and
told in one line.

The line gives counts by kind and the first problem; the whole list is a table
`slide,patch,kind,detail`.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from wsi_common.errors import UserError
from wsi_common.files import write_csv

logger = logging.getLogger(__name__)
COLUMNS = ("slide", "patch", "kind", "detail")
UNDECODABLE = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one pair."""

    slide: str
    patch: str
    kind: str
    detail: str


class Problems:
    """The problems of one set."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, slide: str, patch: str, kind: str, detail: str) -> None:
        """Note a problem."""
        self.found.append(Problem(slide, patch, kind, detail))

    def summary(self) -> str:
        """`3 missing picture, 1 not finite`: counts by kind, most frequent first."""
        counts = Counter(problem.kind for problem in self.found)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())

    def settle(self, source: Path, usable: int, report: Path | None, skip_bad: bool) -> None:
        """Write the table, or remove an old one when nothing is wrong.

        Args:
            source: the set.
            usable: pairs that can be trained on.
            report: where the table goes; None: nowhere.
            skip_bad: go on with what is usable, after a warning.

        Raises:
            UserError: problems without `skip_bad`, or nothing usable.
        """
        if not self.found:
            if report is not None:
                report.unlink(missing_ok=True)
            if not usable:
                raise UserError(f"{source}: expected pairs of tile and teacher feature, found none")
            return
        listed = ""
        if report is not None:
            write_csv(report, COLUMNS, (asdict(problem) for problem in self.found))
            listed = f", all in {report}"
        first = self.found[0]
        line = (
            f"{source}: {len(self.found)} problems ({self.summary()}){listed}; first: "
            f"{first.detail}"
        )
        if not skip_bad or not usable:
            remedy = (
                "mend the set, or set skip_bad=true to do without them"
                if usable
                else "no pair is left to train on"
            )
            raise UserError(f"{line}; {remedy}")
        logger.warning("%s; going on with the other %d pairs", line, usable)


def read_picture_size(picture: bytes | Path, verify: bool) -> tuple[int, int]:
    """(width, height) of an encoded picture by its header; `verify` decodes all of it.

    Raises:
        ValueError: it is none that can be decoded.
    """
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if verify:
                image.load()
            return image.size
    except UNDECODABLE as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_header_size(start: bytes) -> tuple[int, int] | None:
    """(width, height) by a picture's first bytes; None where its header is longer or it is no
    picture.
    """
    try:
        return read_picture_size(start, verify=False)
    except ValueError:
        return None


def decode_tile(picture: bytes) -> np.ndarray:
    """uint8 (H, W, 3) of an encoded picture.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return np.asarray(image.convert("RGB"))
    except UNDECODABLE as error:
        raise ValueError(" ".join(str(error).split())) from None
