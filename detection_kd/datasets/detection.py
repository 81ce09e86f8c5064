"""Images and boxes of a detection set as training samples and padded batches.

A sample depends on (seed, epoch, index) alone: a resumed run and a run on more processes or workers
see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detection_kd.datasets.augmentation_keys import DetectionSizes
from detection_kd.datasets.coco import ImageRecord
from patch_encoder.models.encoder_table import IMAGENET
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.seed import epoch_generator, seed_worker


@dataclass
class DetectionSample:
    """One transformed image: (3, H, W) bytes, (N, 4) cxcywh fractions, (N,) class indices, and its
    record's number.
    """

    image: UInt8[Tensor, "3 h w"]
    boxes: Float[Tensor, "n 4"]
    labels: Tensor
    index: int


@dataclass
class DetectionBatch:
    """Samples padded to one size, on the right and at the bottom.

    Attributes:
        images: (B, 3, H, W), 0 in the padding; bytes from the loader, after `to`
            ImageNet-normalised float32.
        padding: (B, H, W), True where a pixel is padding.
        boxes: per image (N_b, 4) cxcywh fractions of the unpadded image.
        labels: per image (N_b,) class indices.
        indices: numbers of the images in the set.
    """

    images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    padding: Bool[Tensor, "b h w"]
    boxes: list[Tensor]
    labels: list[Tensor]
    indices: list[int]

    def to(self, device: torch.device) -> DetectionBatch:
        """The batch on a device, images channels-last and normalised there: a quarter of the bytes
        to copy.
        """
        padding = self.padding.to(device, non_blocking=True)
        return DetectionBatch(
            normalise(
                self.images.to(device, non_blocking=True, memory_format=torch.channels_last),
                padding,
            ),
            padding,
            [boxes.to(device, non_blocking=True) for boxes in self.boxes],
            [labels.to(device, non_blocking=True) for labels in self.labels],
            self.indices,
        )

    def pin_memory(self) -> DetectionBatch:
        """The batch in page-locked memory, for DataLoader."""
        boxes, labels = (
            [b.pin_memory() for b in self.boxes],
            [label.pin_memory() for label in self.labels],
        )
        return DetectionBatch(
            self.images.pin_memory(), self.padding.pin_memory(), boxes, labels, self.indices
        )


def normalise(
    images: UInt8[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b 3 h w"]:
    """Bytes -> float32 with ImageNet's mean and standard deviation, 0 in the padding."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in IMAGENET)
    return images.float().div_(255).sub_(mean).div_(std).masked_fill_(padding[:, None], 0.0)


class DetectionDataset(Dataset[DetectionSample]):
    """Transformed images of one epoch.

    Args:
        records: images and boxes; crowd regions are left out of the samples.
        transform: (image, {boxes, labels}) -> the same, from `transforms`.
        seed: of the run.
        epoch: epochs before this one.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        transform: Callable[..., Any],
        seed: int = 0,
        epoch: int = 0,
    ) -> None:
        self.records, self.transform, self.seed, self.epoch = records, transform, seed, epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> DetectionSample:
        from torchvision import tv_tensors  # a while to load
        from torchvision.transforms.v2 import functional as F
        from torchvision.tv_tensors import BoundingBoxFormat

        record = self.records[index]
        image = tv_tensors.Image(F.pil_to_tensor(read_image(record)))
        kept = ~record.crowd
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(record.boxes[kept]),
                format=BoundingBoxFormat.XYXY,
                canvas_size=(record.height, record.width),
            ),
            "labels": torch.from_numpy(record.labels[kept]),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed * 100_003 + self.epoch) * 1_000_003 + index) % 2**63)
            image, target = self.transform(image, target)
        height, width = image.shape[-2:]
        boxes = F.convert_bounding_box_format(
            target["boxes"], new_format=BoundingBoxFormat.CXCYWH
        ).as_subclass(Tensor)
        boxes = boxes / torch.tensor([width, height, width, height])
        return DetectionSample(image.as_subclass(Tensor), boxes, target["labels"], index)


def read_image(record: ImageRecord) -> Image.Image:
    """The RGB image of a record.

    Raises:
        UserError: unreadable, or of another size than the annotations say.
    """
    try:
        with Image.open(record.path) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            rgb.load()
    except OSError as error:  # UnidentifiedImageError is one
        raise UserError(f"{record.path}: expected an image, cannot be read: {error}") from None
    if rgb.size != (record.width, record.height):
        raise UserError(
            f"{record.path}: expected {record.width} x {record.height} px as annotated, found "
            f"{rgb.width} x {rgb.height} px"
        )
    return rgb


def collate(samples: list[DetectionSample], pad_to: int = 0) -> DetectionBatch:
    """Pad samples to the largest height and width among them, at least `pad_to` px."""
    height = max(pad_to, *(sample.image.shape[1] for sample in samples))
    width = max(pad_to, *(sample.image.shape[2] for sample in samples))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        _, h, w = sample.image.shape
        images[row, :, :h, :w] = sample.image
        padding[row, :h, :w] = False
    return DetectionBatch(
        images,
        padding,
        [s.boxes for s in samples],
        [s.labels for s in samples],
        [s.index for s in samples],
    )


def draw_epoch_indices(
    images: int, batch_size: int, seed: int, epoch: int, rank: int = 0, processes: int = 1
) -> list[int]:
    """This process's share of an epoch's shuffled images; the union over processes of each step is
    the same global batch.

    The images that do not fill a last batch are left to other epochs, as published.
    """
    order = torch.randperm(images, generator=epoch_generator(seed, epoch)).tolist()
    return order[: images // batch_size * batch_size][rank::processes]


def make_loader(
    dataset: DetectionDataset,
    indices: Sequence[int],
    batch_size: int,
    *,
    workers: int,
    pad_to: int = 0,
    pin: bool = False,
) -> DataLoader[DetectionSample]:
    """Batches of `indices` in their order; `batch_size` images of this process each."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=list(indices),
        num_workers=workers,
        collate_fn=partial(collate, pad_to=pad_to),
        pin_memory=pin,
        worker_init_fn=seed_worker,
        generator=epoch_generator(dataset.seed, dataset.epoch),
    )


def make_training_loader(
    records: Sequence[ImageRecord],
    sizes: DetectionSizes,
    world: World,
    *,
    batch_size: int,
    share: int,
    seed: int,
    epoch: int,
    workers: int,
) -> DataLoader[Any]:
    """Load this process's batches of one epoch, augmented.

    Args:
        records: the training images.
        sizes: of the augmentation.
        world: this process.
        batch_size: images per optimiser step over all processes.
        share: images per batch of this process, from `share_batch`.
        seed: seed of the run.
        epoch: how many epochs came before this one.
        workers: processes that load images.
    """
    from detection_kd.datasets.transforms import make_train_transform  # a while to load

    low, high = sizes.crop_range
    transform = make_train_transform(
        sizes.sizes,
        sizes.max_size,
        crop_sizes=sizes.crop_sizes,
        crop_range=(low, high),
        symmetry=sizes.symmetry,
    )
    dataset = DetectionDataset(records, transform, seed, epoch)
    indices = draw_epoch_indices(len(dataset), batch_size, seed, epoch, world.rank, world.size)
    pin = world.device.type == "cuda"
    return make_loader(dataset, indices, share, workers=workers, pad_to=sizes.pad_to, pin=pin)


def make_eval_loader(
    records: Sequence[ImageRecord],
    sizes: DetectionSizes,
    world: World,
    *,
    share: int,
    workers: int,
) -> DataLoader[Any]:
    """Load this process's share of the validation images, `share` of them per batch."""
    from detection_kd.datasets.transforms import make_eval_transform  # a while to load

    dataset = DetectionDataset(records, make_eval_transform(sizes.eval_size, sizes.max_size))
    indices = range(len(dataset))[world.rank :: world.size]
    pin = world.device.type == "cuda"
    return make_loader(dataset, indices, share, workers=workers, pad_to=sizes.pad_to, pin=pin)
