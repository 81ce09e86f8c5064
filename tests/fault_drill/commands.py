"""The commands of the drill, and the small finished work that each case gets a copy of."""

from __future__ import annotations

from pathlib import Path

from tests.fault_drill.case import run_child
from tests.helpers import draw_slide, write_pyramid
from tests.mil.conftest import write_cohort

TILE = (
    "patch_encoder.tile_slides slides=slides output=new tile_size=64 tissue.mpp=2 tissue.median=4 "
    "tissue.closing=4 tissue.min_area=50 workers=0"
)
TILE_AGAIN = TILE.replace("output=new", "output=tiles")
EXTRACT = (
    "patch_encoder.extract_features slides=slides coords=tiles output=new encoder=mean_colour "
    "device=cpu workers=0 batch_size=4"
)
EXTRACT_AGAIN = EXTRACT.replace("output=new", "output=features")
NETWORK = EXTRACT.replace("mean_colour", "resnet18 weights=random precision=fp32")
TRAIN = (
    "mil.train labels=cohort/labels.csv features=cohort/bags output=new model=mean folds=2 "
    "training.epochs=3 training.min_epochs=1 device=cpu"
)
TRAIN_AGAIN = TRAIN.replace("output=new", "output=run")
LONG = TRAIN.replace("epochs=3", "epochs=1200").replace("min_epochs=1", "min_epochs=1200")
PRETRAIN = (
    "patch_encoder.pretrain_dino slides=slides coords=tiles output=new network.arch=timm:test_vit "
    "network.drop_path=0.0 network.out_dim=16 network.hidden_dim=16 network.bottleneck_dim=8 "
    "views.global_size=32 views.local_size=16 views.local_number=1 shuffle.grid=2 tile_size=64 "
    "batch_size=4 epochs=2 epoch_tiles=8 training.warmup=1 open_slides=3 tiles_per_visit=2 "
    "device=cpu workers=0"
)
LONG_PRETRAIN = PRETRAIN.replace("epochs=2", "epochs=20")
REGIONS_AGAIN = (
    "patch_encoder.build_regions features=features/mean_colour output=regions region_tiles=2 "
    "min_regions=2"
)
SLPD = (
    "patch_encoder.pretrain_slpd regions=regions/mean_colour output=new network.width=8 "
    "network.depth=1 network.heads=2 network.drop_path=0.0 network.out_dim=16 network.hidden_dim=16 "
    "network.bottleneck_dim=8 views.local_number=1 prototypes.start_epoch=1 prototypes.clusters=2 "
    "prototypes.min_regions=2 batch_size=4 epochs=2 training.warmup=1 save_minutes=0 device=cpu"
)
LONG_SLPD = SLPD.replace("epochs=2", "epochs=12")
PACK = (
    "detection_kd.pack_distillation slides=slides features=features/mean_colour coords=tiles "
    "output=new/set.h5 workers=0"
)
REGIONS = (
    "patch_encoder.build_regions features=features/mean_colour output=new region_tiles=2 "
    "form=materialised"
)
REPORT = "patch_encoder.cohort_report tiling=tiles features=[features/mean_colour] output=new"
FILTER = "patch_encoder.filter_tiles tiling=tiles output=new max_pen=0.5"
INSPECT = "patch_encoder.inspect_slides slides=slides workers=0"
EVALUATE = "mil.evaluate run=run output=new"


def make_template(folder: Path) -> None:
    """Three slides that are tiled, encoded and cut into regions, and a cohort of bags with one finished training."""
    for index in range(3):
        write_pyramid(
            folder / "slides" / f"S{index}.tiff", draw_slide(256, seed=index), levels=(1, 2)
        )
    write_cohort(folder / "cohort", slides=12, dim=4)
    for command in (TILE_AGAIN, EXTRACT_AGAIN, REGIONS_AGAIN, TRAIN_AGAIN):
        status, log = run_child(command, folder)
        assert status == 0, log
