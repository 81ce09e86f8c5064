"""The benchmark that the tests of heatmaps draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artefacts import copy_of, make_once


def make_pictured_benchmark(root: Path) -> None:
    """A benchmark in `bench` of two slide classifiers on the 16 slides in `cohort`, which have
    pictures.
    """
    import mil.benchmark as benchmark
    from tests.mil.conftest import write_cohort
    from tests.mil.heatmaps.drawn_pages import SMALL
    from wsi_common.config import load_config

    cohort = write_cohort(root / "cohort", pictures=True, slides=16)
    sources = [f"labels={cohort}/labels.csv", f"features=[{cohort}/bags]", f"output={root}/bench"]
    once = ["isolated=false", "folds=2", "seeds=[3]", "resamples=10", "models=[mean,abmil]"]
    assert benchmark.main(load_config(benchmark.Config, [*sources, *SMALL, *once])) == 0


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy to spoil: the cohort in `cohort`, the finished benchmark in `bench`, which says where
    its bags are.
    """
    made = make_once(tmp_path_factory, "pictured_benchmark", make_pictured_benchmark)
    return copy_of(made, tmp_path) / "bench"
