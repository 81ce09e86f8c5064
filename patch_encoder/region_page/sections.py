"""What the page shows of a slide: its neighbours with matched regions side by side, and a gallery
of its prototypes.

The number of pictures depends on the number of slides that are shown alone, and not on the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patch_encoder.region_page.retrieval import Retrieval
from patch_encoder.region_page.slide_pictures import QUALITY, SlidePictures, paint_regions
from wsi_common.figures import QUIET, jpeg_uri, palette_colour

MOST_PROTOTYPES = 6  # of a slide, the largest ones; one colour each
TYPICAL = 5  # regions of a prototype
THUMBNAIL, CROP, OVERVIEW = 250, 150, 460  # px


@dataclass(frozen=True)
class SlideCard:
    """A slide: its picture with the regions of matched prototypes in one colour.

    Attributes:
        uri: empty where the slide cannot be read.
        same: whether its label is that of the slide it is a neighbour of.
        similarity: to that slide, mean cosine of matched prototypes; 1 for that slide itself.
        crops: the most typical region of each shown prototype, in the order of the query's.
        cosines: of these prototypes with the query's.
    """

    name: str
    label: str
    regions: int
    uri: str
    same: bool
    similarity: float
    crops: list[str]
    cosines: list[float]


@dataclass(frozen=True)
class QuerySection:
    """A slide, the slides like it, and the colours and shares of its prototypes."""

    query: SlideCard
    neighbours: list[SlideCard]
    colours: list[str]
    shares: list[float]


@dataclass(frozen=True)
class PrototypeRow:
    """A prototype in the gallery: its colour, regions, share of the slide, and typical regions."""

    colour: str
    count: int
    share: float
    crops: list[str]


@dataclass(frozen=True)
class GallerySection:
    """All prototypes of a slide, and how many more it has than are shown."""

    name: str
    label: str
    regions: int
    plain: str
    painted: str
    prototypes: list[PrototypeRow]
    more: int


@dataclass(frozen=True)
class SectionMaker:
    """Draws slides and regions of a retrieval."""

    retrieval: Retrieval
    pictures: SlidePictures

    def draw_query(self, slide: int) -> QuerySection:
        """A slide and its neighbours."""
        found = self.retrieval
        order = found.order_clusters(slide)[:MOST_PROTOTYPES]
        sizes = found.clusters.sizes[slide]
        cards = []
        for place, other in enumerate(found.neighbours(slide)):
            partner = found.near.partner[slide, place, order].tolist()
            cosines = found.cosines[slide, place, order].tolist()
            cards.append(
                self._draw_card(other, partner, found.similarity(slide, place), cosines, slide)
            )
        return QuerySection(
            self._draw_card(slide, order, 1.0, [1.0] * len(order), slide),
            cards,
            [palette_colour(number) for number in range(len(order))],
            (sizes[order] / sizes.sum()).tolist(),
        )

    def draw_gallery(self, slide: int) -> GallerySection:
        """The prototypes of a slide."""
        found, regions = self.retrieval, self.retrieval.regions
        order = found.order_clusters(slide)
        shown = order[:MOST_PROTOTYPES]
        sizes, total = found.clusters.sizes[slide].tolist(), int(regions.counts[slide])
        name = regions.slides[slide]
        seen = self.pictures.overview(name, OVERVIEW)
        return GallerySection(
            name,
            regions.labels[slide],
            total,
            jpeg_uri(seen[0], QUALITY) if seen else "",
            self._paint(slide, shown, OVERVIEW),
            [
                PrototypeRow(
                    palette_colour(number),
                    sizes[cluster],
                    sizes[cluster] / total,
                    self._crop(slide, found.list_typical(slide, cluster, TYPICAL)),
                )
                for number, cluster in enumerate(shown)
            ],
            len(order) - len(shown),
        )

    def _draw_card(
        self,
        slide: int,
        clusters: Sequence[int],
        similarity: float,
        cosines: list[float],
        query: int,
    ) -> SlideCard:
        regions = self.retrieval.regions
        label = regions.labels[slide]
        typical = [self.retrieval.list_typical(slide, cluster, 1) for cluster in clusters]
        return SlideCard(
            regions.slides[slide],
            label,
            int(regions.counts[slide]),
            self._paint(slide, clusters, THUMBNAIL),
            bool(label) and label == regions.labels[query],
            similarity,
            [self._crop(slide, one)[0] for one in typical],
            cosines,
        )

    def _crop(self, slide: int, numbers: Sequence[int]) -> list[str]:
        regions = self.retrieval.regions
        return [
            self.pictures.crop(
                regions.slides[slide],
                tuple(regions.corners[number].tolist()),
                regions.sides[slide],
                CROP,
            )
            for number in numbers
        ]

    def _paint(self, slide: int, clusters: Sequence[int], side: int) -> str:
        """The slide with the regions of these clusters in the palette's colours, others grey."""
        regions = self.retrieval.regions
        seen = self.pictures.overview(regions.slides[slide], side)
        if seen is None:
            return ""
        colour = {cluster: palette_colour(number) for number, cluster in enumerate(clusters)}
        part = regions.regions(slide)
        assigned = self.retrieval.clusters.assignment[part].tolist()
        painted = paint_regions(
            *seen,
            regions.corners[part],
            regions.sides[slide],
            [colour.get(cluster, QUIET) for cluster in assigned],
        )
        return jpeg_uri(painted, QUALITY)
