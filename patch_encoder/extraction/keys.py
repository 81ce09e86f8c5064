"""The configuration keys that extraction scripts share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patch_encoder.cohort.keys import CohortKeys, ShardKeys
from patch_encoder.cohort.shards import Shard
from patch_encoder.extraction.loop import ExtractSettings
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.models.pooling import POOLS
from patch_encoder.stain.normaliser import KINDS, SCOPES, build_normaliser
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import PRECISIONS, pick_device, pick_precision
from wsi_common.errors import UserError
from wsi_common.processes.pool import pick_workers
from wsi_common.processes.ray_cluster import ENGINE_HELP, ENGINES, RaySettings, import_ray

RAY_WORKERS = 2  # decoding processes of each worker of Ray that are started unasked


@dataclass
class DeviceKeys:
    """Where and how precisely an encoder computes."""

    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32",
        choices=PRECISIONS,
    )


@dataclass
class EncoderKeys:
    """Which form of an encoder is built."""

    weights: str = key(
        "", "weights file or folder; empty: from the encoder's hub; random: untrained"
    )
    pool: str = key(
        "published",
        "what is pooled; tokens of a transformer: class token, mean of the patch tokens, or both",
        choices=POOLS,
    )
    layer: int = key(0, "stage of a ResNet that is pooled, 1 to 4; 0: as the encoder table says")


@dataclass
class StainKeys:
    """What stain normalisation goes by."""

    stain_target: str = key(
        "", "picture of H&E whose stain the tiles get; empty: a common reference", path=True
    )
    stain_scope: str = key(
        "slide",
        "stain statistics of the whole slide, or of each tile; 64 of a slide's tiles are measured",
        choices=SCOPES,
    )


@dataclass
class NamedEncoderKeys(EncoderKeys):
    """An encoder by name."""

    encoder: str = key(
        "stain_texture",
        "encoder: a name that list_encoders prints, timm:<model>, "
        "open_clip:<model>/<tag>, hf:<repo> or dino",
    )
    crop: bool = key(
        True,
        "centre crop where the encoder's own processor has one; false: the whole tile, resized",
    )

    def load_encoder(self) -> Encoder:
        """The encoder of these keys."""
        return build_encoder(self.encoder, self.weights, self.pool, self.layer, self.crop)


@dataclass
class CoordsKeys:
    """Where the tiles of a cohort stand."""

    coords: str = key(REQUIRED, "folder of coordinates files", path=True)


@dataclass
class PassKeys(DeviceKeys, CohortKeys, ShardKeys):
    """Keys of every pass over a cohort's tiles."""

    output: str = key(
        REQUIRED,
        "where the results are written; bags go to <output>/<encoder>/h5_files",
        runtime=True,
    )
    batch_size: int = key(64, "items per step over all processes; tiles", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; they decode; null: one per core, at most 8; 0: the main process does, "
        "which a slide that crashes its reader ends",
        runtime=True,
    )
    dtype: str = key(
        "float32", "number format of the stored features", choices=("float16", "float32")
    )
    pt: bool = key(False, "also write pt_files/<slide_id>.pt")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)

    def settings(self) -> ExtractSettings:
        """What the extraction loop needs of these keys, with device and precision resolved."""
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: expected at least 1")
        workers = pick_workers(self.workers, self.read_timeout)
        device = pick_device(self.device)
        precision = pick_precision(self.precision, device)
        shard = Shard.parse(self.shard)
        return ExtractSettings(
            device, precision, self.batch_size, workers, self.dtype, self.pt, self.overwrite,
            read_timeout=self.read_timeout, shard=shard, selection=self.selection(),
        )  # fmt: skip


@dataclass
class ExtractionKeys(CoordsKeys, PassKeys):
    """Keys of a pass over tiles that are there; a script adds those of its encoder."""


@dataclass
class FeatureKeys(StainKeys, PassKeys):
    """Keys of the scripts that write feature bags."""

    max_bad_tiles: float = key(
        0.0, "largest share of a slide's tiles that may be unreadable; the bag is then without them"
    )
    stain: str = key("none", "stain normalisation of the tiles; before the encoder", choices=KINDS)
    compile: bool = key(
        False,
        "compile the network with torch.compile; a minute at the start, faster from then on",
        runtime=True,
    )
    engine: str = key("local", ENGINE_HELP, choices=ENGINES, runtime=True)
    ray: RaySettings = group(RaySettings, "workers of engine=ray")

    def settings(self) -> ExtractSettings:
        """The same with what concerns features."""
        if not 0 <= self.max_bad_tiles <= 1:
            raise UserError(
                f"max_bad_tiles={self.max_bad_tiles}: expected a share, 0 <= max_bad_tiles <= 1"
            )
        ray, settings = None, super().settings()
        if self.engine == "ray":
            import_ray()
            ray = self.ray
            if self.workers is None:  # the cores of this machine are not those of the cluster
                settings = replace(settings, workers=RAY_WORKERS)
        compiler = "inductor" if self.compile else ""
        stain = build_normaliser(self.stain, self.stain_target, self.stain_scope)
        return replace(
            settings,
            max_bad_tiles=self.max_bad_tiles,
            compiler=compiler,
            ray=ray,
            stain=stain,
        )
