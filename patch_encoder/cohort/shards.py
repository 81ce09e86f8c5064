"""Divide a cohort: among processes that know their number, or into bundles for workers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patch_encoder.cohort.slide_files import FoundSlides
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`.

    Attributes:
        divided: the slides at hand are this part already.
    """

    index: int = 1
    count: int = 1
    divided: bool = False

    @staticmethod
    def parse(text: str) -> Shard:
        """`i/n`; empty: the whole.

        Raises:
            UserError: anything else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(
                f"shard={text}: expected i/n with 1 <= i <= n, as shard=1/4 ... shard=4/4 for "
                "four processes"
            )
        return Shard(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """`1-of-4`; empty for the whole."""
        return f"{self.index}-of-{self.count}" if self.count > 1 else ""

    def select(self, jobs: Sequence[SlideJob]) -> list[SlideJob]:
        """Every count-th slide by number of tiles, so that all parts take about as long."""
        if self.count == 1 or self.divided:
            return list(jobs)
        return sort_largest_first(jobs)[self.index - 1 :: self.count]

    def divide(self, cohort: FoundSlides) -> FoundSlides:
        """This part of a cohort without tiles yet; what is wrong with others is told by the first
        part.
        """
        slides = self.divide_files(cohort.slides)
        return replace(cohort, slides=slides, problems=cohort.problems if self.index == 1 else {})

    def divide_files(self, files: Mapping[str, Path]) -> dict[str, Path]:
        """This part of some slides by name: every count-th one by the size of its file."""
        sizes = {name: path.stat().st_size for name, path in files.items()}
        largest = sorted(files, key=lambda name: (-sizes[name], name))
        return {name: files[name] for name in sorted(largest[self.index - 1 :: self.count])}


def count_tiles(jobs: Sequence[SlideJob]) -> int:
    """Tiles of all jobs."""
    return sum(len(job.coordinates.coords) for job in jobs)


def sort_largest_first(jobs: Sequence[SlideJob]) -> list[SlideJob]:
    """By falling number of tiles, ties by slide id."""
    return sorted(jobs, key=lambda job: (-len(job.coordinates.coords), job.slide_id))


def make_bundles(jobs: Sequence[SlideJob], least: int) -> list[list[SlideJob]]:
    """Largest first; slides below `least` tiles are put together, so that they share batches."""
    out: list[list[SlideJob]] = []
    for job in sort_largest_first(jobs):
        if not out or count_tiles(out[-1]) >= least:
            out.append([])
        out[-1].append(job)
    return out
