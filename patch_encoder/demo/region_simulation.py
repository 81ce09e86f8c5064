"""Simulate feature bags whose regions have known zones, for claims that rendered pixels cannot
carry.

A tile feature is the vector of its type, plus an offset of its slide, plus noise. A zone is a
mixture of types and says whether tiles of one type lie together; the slide's label decides how much
of each zone it has. The offset stands for what differs from slide to slide and means nothing, such
as stain; `nuisance` scales it, and all other random numbers are the same for every nuisance.

The mixtures overlap, and two pairs of zones differ mostly in how their tiles are arranged, which
the mean of a region's tiles cannot see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter

from patch_encoder.bags.writer import write_bag
from patch_encoder.demo.cohort_folder import LABEL_COLUMNS, claim_folder
from patch_encoder.demo.cytology.tissue_map import divide_by_shares
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.files import write_csv

ENCODER = "region_simulation"
TILE = 64  # px of level 0; only the grid matters
ZONE_COLUMNS = ("slide_id", "x", "y", "label")
MIXTURES = np.array(
    [
        (0.38, 0.28, 0.14, 0.08, 0.07, 0.05),
        (0.30, 0.28, 0.18, 0.10, 0.08, 0.06),
        (0.05, 0.07, 0.11, 0.18, 0.26, 0.33),
        (0.06, 0.08, 0.13, 0.20, 0.28, 0.25),
    ]
)
"""(Z, T): how much of each type a zone holds."""
CLUMPS = (1, 4, 1, 4)
"""Width, in tiles, over which tiles of a zone resemble each other; 1: they are independent."""
SHARES = {"negative": (0.37, 0.27, 0.21, 0.15), "positive": (0.15, 0.21, 0.27, 0.37)}
"""Mean share of each zone in a slide with a label."""
CONCENTRATION = 8.0
"""How little a slide's shares differ from those of its label (of a Dirichlet distribution)."""
_TYPES, _SLIDE = 1, 2  # one branch of the seed for each purpose


@dataclass(frozen=True)
class RegionSimulation:
    """What is simulated.

    Attributes:
        slides: half of them (rounded down) positive.
        rows, columns: regions of a slide.
        region_tiles: side of a region in tiles, G.
        width: of a feature, D.
        noise: standard deviation per channel, where vectors of types have 1.
        nuisance: standard deviation of the slides' offsets per channel.
        seed: of everything that is drawn.
    """

    slides: int = 80
    rows: int = 4
    columns: int = 5
    region_tiles: int = 6
    width: int = 24
    noise: float = 0.8
    nuisance: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class SimulatedSlide:
    """One slide: its tiles (rows G, columns G, D) float16 and the zone of each region
    (rows, columns).
    """

    slide_id: str
    label: str
    tiles: np.ndarray
    zones: np.ndarray


def simulate_slide(simulation: RegionSimulation, number: int) -> SimulatedSlide:
    """Draw slide `number`; it does not depend on the others."""
    label = ("negative", "positive")[number % 2]
    rng = _make_generator(simulation.seed, _SLIDE, number)
    zones = _draw_zones(rng, label, (simulation.rows, simulation.columns))
    of_tile = zones.repeat(simulation.region_tiles, 0).repeat(simulation.region_tiles, 1)
    types = _draw_types(rng, of_tile)
    vectors = _make_generator(simulation.seed, _TYPES).standard_normal(
        (MIXTURES.shape[1], simulation.width)
    )
    offset = simulation.nuisance * rng.standard_normal(simulation.width)
    noise = simulation.noise * rng.standard_normal((*types.shape, simulation.width))
    tiles = (vectors[types] + offset + noise).astype(np.float16)
    return SimulatedSlide(f"R{number + 1:04d}", label, tiles, zones)


def _make_generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def _draw_zones(rng: np.random.Generator, label: str, shape: tuple[int, int]) -> np.ndarray:
    shares = rng.dirichlet(CONCENTRATION * np.array(SHARES[label]))
    scores = rng.standard_normal((len(shares), *shape))
    smooth = uniform_filter(scores, 3, mode="nearest", axes=(1, 2))
    return divide_by_shares(smooth / smooth.std(), shares)


def _draw_types(rng: np.random.Generator, zones: np.ndarray) -> np.ndarray:
    """The type of each tile: the quantile, in its zone's mixture, of a normal field that is smooth
    over CLUMPS, so that clumping leaves the mixture as it is.
    """
    from scipy.special import ndtr  # a while to load

    field = rng.standard_normal(zones.shape)
    smooth = {
        size: size * uniform_filter(field, size, mode="wrap") if size > 1 else field
        for size in set(CLUMPS)
    }
    values = ndtr(np.stack([smooth[size] for size in CLUMPS]))
    uniform = np.take_along_axis(values, zones[None], 0)[0]
    edges = np.cumsum(MIXTURES, axis=1)[zones]
    return (uniform[..., None] >= edges[..., :-1]).sum(-1)


def write_simulated_cohort(
    folder: Path, simulation: RegionSimulation, overwrite: bool = False
) -> None:
    """Write `features/h5_files/*.h5`, labels.csv and zones.csv (slide_id, corner x, y, zone), which
    appears last; what is there of the same simulation is kept.

    Raises:
        UserError: the folder holds another simulation, or anything else.
    """
    claim_folder(folder, ENCODER, asdict(simulation), overwrite)
    if (folder / "zones.csv").is_file():
        return
    labels, zones = [], []
    for number in range(simulation.slides):
        slide = simulate_slide(simulation, number)
        _write_bag(folder / "features" / "h5_files" / f"{slide.slide_id}.h5", slide, simulation)
        case = {"case_id": slide.slide_id, "slide_id": slide.slide_id}
        labels.append({**case, "label": slide.label, "split": "cv", "mpp": 0.5})
        side = simulation.region_tiles * TILE
        for (row, column), zone in np.ndenumerate(slide.zones):
            corner = {"slide_id": slide.slide_id, "x": column * side, "y": row * side}
            zones.append({**corner, "label": f"zone_{zone}"})
    write_csv(folder / "labels.csv", LABEL_COLUMNS, labels)
    write_csv(folder / "zones.csv", ZONE_COLUMNS, zones)


def _write_bag(path: Path, slide: SimulatedSlide, simulation: RegionSimulation) -> None:
    height, width, channels = slide.tiles.shape
    corners = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) * TILE
    geometry = TileGeometry(
        *(slide.slide_id, TILE, TILE, 0, TILE, 0.5, 0.5, 0.0, width * TILE, height * TILE)
    )
    provenance = {"encoder": ENCODER, "nuisance": simulation.nuisance, "seed": simulation.seed}
    write_bag(path, slide.tiles.reshape(-1, channels), corners, asdict(geometry), provenance)
