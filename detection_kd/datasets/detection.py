"""Images and boxes of a detection set as training samples and padded batches.

A sample depends on (seed, epoch, index, how often it came before in the epoch) alone: a resumed run
and a run on more processes or workers see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
    """Transformed images of one epoch; numbers from the size of the set on are further repeats of
    its images, transformed otherwise.

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

    def __getitem__(self, number: int) -> DetectionSample:
        from torchvision import tv_tensors  # a while to load
        from torchvision.transforms.v2 import functional as F
        from torchvision.tv_tensors import BoundingBoxFormat

        index = number % len(self.records)
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
            torch.manual_seed(((self.seed * 100_003 + self.epoch) * 1_000_003 + number) % 2**63)
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
    images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    processes: int = 1,
    repeats: np.ndarray | None = None,
) -> list[int]:
    """This process's share of an epoch's shuffled images; the union over processes of each step is
    the same global batch.

    The images that do not fill a last batch are left to other epochs, as published.

    Args:
        images: in the set.
        batch_size: images per step over all processes.
        seed: of the run.
        epoch: how many came before.
        rank, processes: this process, and how many there are.
        repeats: how often each image is met, from `find_repeats`; None: once.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(images, generator=generator).tolist()
    if repeats is not None:
        order = draw_repeats(repeats, order, generator)
    return order[: len(order) // batch_size * batch_size][rank::processes]


def draw_repeats(repeats: np.ndarray, order: list[int], generator: torch.Generator) -> list[int]:
    """The images of an epoch in which each is met as often as `repeats` says, on average.

    An epoch has the whole part of the sum of `repeats` as its length, whatever is drawn, so that
    the learning rate's schedule knows it. The k-th repeat of image i is number i + k * images.
    """
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    ends = np.floor(np.cumsum(repeats[order]) + start).astype(np.int64)
    times = np.diff(ends, prepend=0)
    numbers = [
        image + len(order) * repeat
        for image, count in zip(order, times.tolist(), strict=True)
        for repeat in range(count)
    ]
    shuffled = torch.randperm(len(numbers), generator=generator).tolist()
    return [numbers[place] for place in shuffled][: int(repeats.sum())]


def find_repeats(records: Sequence[ImageRecord], threshold: float) -> np.ndarray | None:
    """How often an epoch meets each image, so that rare classes are not drowned.

    Source: repeat factor sampling of LVIS (Gupta et al., CVPR 2019, arXiv:1908.03195, section 3.2):
    max over the classes c in the image of max(1, sqrt(threshold / f_c)), where f_c is the share of
    the images that hold class c; 1 without boxes. Difference: an epoch's length is fixed.

    Args:
        records: the training images; crowd regions do not count.
        threshold: share of the images below which a class is rare; 0: None is returned.

    Raises:
        UserError: no share.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"repeat_threshold={threshold:g}: expected a share of the images, 0 to 1")
    if not threshold:
        return None
    held = [np.unique(record.labels[~record.crowd]) for record in records]
    counts = np.bincount(np.concatenate(held))
    factors = np.sqrt(threshold * len(records) / np.maximum(counts, 1)).clip(min=1.0)
    return np.array([factors[labels].max(initial=1.0) for labels in held])


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
    repeats: np.ndarray | None = None,
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
        repeats: how often each image is met, from `find_repeats`; None: once.

    Raises:
        UserError: a strength of the stain augmentation that makes no sense.
    """
    from detection_kd.datasets.transforms import make_train_transform  # a while to load

    if not 0 <= sizes.stain < 1:
        raise UserError(f"augmentation.stain={sizes.stain:g}: expected 0 <= stain < 1")
    low, high = sizes.crop_range
    transform = make_train_transform(
        sizes.sizes,
        sizes.max_size,
        crop_sizes=sizes.crop_sizes,
        crop_range=(low, high),
        symmetry=sizes.symmetry,
        stain=sizes.stain,
    )
    dataset = DetectionDataset(records, transform, seed, epoch)
    share_of = (world.rank, world.size)
    indices = draw_epoch_indices(len(dataset), batch_size, seed, epoch, *share_of, repeats)
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
