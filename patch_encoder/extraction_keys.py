"""The configuration keys that every extraction script has, whatever its encoder."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import REQUIRED, key
from common.device import PRECISIONS, pick_device, pick_precision
from patch_encoder.engine import ExtractSettings


@dataclass
class ExtractionKeys:
    """Keys of extraction; a script's `Config` inherits them and adds those of its encoder."""

    slides: str = key(REQUIRED, "folder of slides, any tree", path=True)
    coords: str = key(REQUIRED, "folder of coordinates files, as tile_slides wrote it", path=True)
    output: str = key(REQUIRED, "features folder; bags go to <output>/<encoder>/h5_files", runtime=True)
    labels: str = key("", "labels.csv: encode only its slides, and take mpp from it", path=True)
    batch_size: int = key(64, "tiles a batch", runtime=True)
    workers: int = key(2, "decoding processes; 0 decodes in the main process", runtime=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key("auto", "auto: bf16 where the device has it, else fp32", choices=PRECISIONS)
    dtype: str = key("float32", "type of the stored features", choices=("float16", "float32"))
    pt: bool = key(False, "also write pt_files/<slide_id>.pt")
    overwrite: bool = key(False, "replace bags of another provenance", runtime=True)

    def settings(self) -> ExtractSettings:
        """What the extraction loop needs of these keys, with device and precision resolved."""
        device = pick_device(self.device)
        precision = pick_precision(self.precision, device)
        return ExtractSettings(device, precision, self.batch_size, self.workers, self.dtype, self.pt, self.overwrite)
