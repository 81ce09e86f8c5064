"""The configuration keys of networks, losses and optimisation of a self-distillation run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patch_encoder.models.dino_files import find_description, read_description
from patch_encoder.models.encoder_table import Statistics
from patch_encoder.pretraining.objective import TARGETS, Objective
from patch_encoder.pretraining.schedules import DistillationSchedules, scale_lr
from patch_encoder.selfdistill.backbone import RANDOM, describe_architecture, find_initial_row
from patch_encoder.selfdistill.student import SelfDistilled, build_student
from patch_encoder.selfdistill.view_keys import ShuffleKeys, ViewKeys
from patch_encoder.selfdistill.view_recipe import ViewRecipe, check_recipe
from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tile_stream.stream_keys import StreamKeys
from wsi_common.config import group, key
from wsi_common.counters import hash_counters, uniform
from wsi_common.errors import UserError

PYRAMID = 1 << 32  # address of the draws of this file, apart from those of views and tiles


@dataclass
class NetworkKeys:
    """The student; its teacher has the same architecture."""

    arch: str = key(
        "vit_small",
        "network; vit_tiny, vit_small, vit_base, vit_large, resnet18, resnet50, or timm:<model>",
    )
    patch_size: int = key(16, "side of a ViT's patches, px; 8, 14 or 16", least=1)
    registers: int = key(0, "extra tokens of a ViT that are no output", least=0)
    init: str = key(
        "random",
        "weights that the backbone starts from; random, an encoder's name, or a weights file",
    )
    drop_path: float = key(0.1, "stochastic depth of the student, at its last block", least=0)
    out_dim: int = key(65536, "prototypes of the head, K", least=2)
    hidden_dim: int = key(2048, "width of the head's hidden layers", least=1)
    bottleneck_dim: int = key(256, "width of the head's bottleneck", least=1)
    batch_norm: bool = key(False, "batch norm in the head")
    norm_last_layer: bool = key(
        True, "prototypes stay of length 1; false can score better and can diverge"
    )

    def find_statistics(self) -> Statistics | None:
        """Statistics of the pixels that named weights, or those of an earlier run, were trained
        with; None: those of another file or of a random start, which are the views' own.
        """
        row = find_initial_row(self.init)
        if row is None and self.init != RANDOM:
            described = find_description(Path(self.init.partition("#")[0]))
            row = None if described is None else read_description(described)
        return None if row is None else row.statistics

    def describe(self, image_size: int) -> tuple[str, dict[str, Any]]:
        """timm's name of the network, and its options."""
        sizes = {"patch_size": self.patch_size, "registers": self.registers}
        return describe_architecture(self.arch, **sizes, image_size=image_size)

    def build(self, image_size: int) -> SelfDistilled:
        """The student for global views of `image_size` px."""
        return build_student(
            self.arch,
            patch_size=self.patch_size,
            registers=self.registers,
            image_size=image_size,
            drop_path=self.drop_path,
            init=self.init,
            out_dim=self.out_dim,
            hidden_dim=self.hidden_dim,
            bottleneck_dim=self.bottleneck_dim,
            batch_norm=self.batch_norm,
            norm_last_layer=self.norm_last_layer,
        )


@dataclass
class PyramidKeys:
    """INTELLIGENS's view from the slide's pyramid: the same centre in a wider field."""

    factor: int = key(0, "how much wider the field is; 2 or 4; 0: off, as DINO", least=0)
    probability: float = key(1.0, "probability that a step has this view", least=0)
    teacher: bool = key(False, "the teacher sees this view, too, so that it is a target")

    def check(self) -> None:
        """Refuse settings that cannot be, or that nothing would heed."""
        if self.factor == 1:
            raise UserError("pyramid.factor=1: expected a wider field, 2 or 4, or 0 for none")
        if self.probability > 1:
            raise UserError(f"pyramid.probability={self.probability:g}: expected a share, 0 to 1")
        if self.teacher and not self.factor:
            raise UserError("pyramid.teacher=true: expected pyramid.factor of 2 or 4, found 0")

    def is_drawn(self, seed: int, step: int) -> bool:
        """Whether a step has the view: all its tiles do, or none."""
        return uniform(hash_counters(seed, PYRAMID, step), 0) < self.probability


@dataclass
class TileViewKeys(StreamKeys):
    """Keys that decide which tiles and views a network is trained on, and what the network is."""

    network: NetworkKeys = group(NetworkKeys, "student and teacher")
    views: ViewKeys = group(ViewKeys, "the views that networks see; of a tile")
    shuffle: ShuffleKeys = group(ShuffleKeys, "patch shuffle")
    pyramid: PyramidKeys = group(PyramidKeys, "the view from the slide's pyramid")
    epoch_tiles: int = key(0, "tiles of an epoch; 0: as many as the coordinates have", least=0)
    batch_size: int = key(256, "items per step over all processes; tiles", least=2)
    seed: int = key(42, "seed of everything that is drawn at random")

    def make_recipe(self) -> ViewRecipe:
        """The views, checked against tiles and network, with the statistics of the weights that
        training starts from.
        """
        recipe = self.views.build(self.shuffle)
        if (statistics := self.network.find_statistics()) is not None:
            recipe = replace(recipe, mean=statistics[0], std=statistics[1])
        is_vit = self.network.arch.startswith("vit_")
        check_recipe(recipe, self.tile_size, self.network.patch_size if is_vit else 1)
        return recipe

    def count_steps(self, sources: Sequence[TileSource]) -> int:
        """Steps of an epoch over these slides."""
        tiles = self.epoch_tiles or sum(len(source.coordinates.coords) for source in sources)
        if tiles < self.batch_size:
            raise UserError(
                f"epoch_tiles={tiles}: expected at least batch_size={self.batch_size}; lower "
                "batch_size or give a larger epoch_tiles"
            )
        return tiles // self.batch_size


@dataclass
class LossKeys:
    """What the student learns from the teacher."""

    targets: str = key("centring", "how the teacher's logits become targets", choices=TARGETS)
    student_temperature: float = key(0.1, "temperature of the student's softmax")
    temperature: float = key(0.04, "temperature of the teacher's softmax, at the beginning")
    temperature_end: float | None = key(
        None, "the same after its warm-up; above 0.07 unstable in DINO; null: it does not change"
    )
    temperature_warmup: float = key(
        0.0, "epochs in which the teacher's temperature changes", least=0
    )
    centre_momentum: float = key(0.9, "share of the centre that a step keeps")
    koleo: float = key(
        0.0, "weight of KoLeo, which pushes nearest neighbours apart; DINOv2: 0.1", least=0
    )
    kde: float = key(
        0.0, "weight of KDE, which takes KoLeo's place in Virchow2; there 0.05", least=0
    )

    @property
    def temperatures(self) -> tuple[float, float]:
        """The teacher's temperature at the beginning and after its warm-up."""
        end = self.temperature if self.temperature_end is None else self.temperature_end
        return self.temperature, end

    def build(self) -> Objective:
        """Targets and loss."""
        weights = (self.centre_momentum, self.koleo, self.kde)
        return Objective(self.targets, self.student_temperature, *weights)

    def check(self, share: int) -> None:
        """Refuse what no loss can be computed of.

        Args:
            share: tiles that a process takes at a time.
        """
        for name in ("student_temperature", "temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name}={value:g}: expected a value above 0")
        if not 0 <= self.centre_momentum <= 1:
            raise UserError(
                f"objective.centre_momentum={self.centre_momentum:g}: expected a share, 0 to 1"
            )
        if share < 2 and (self.koleo or self.kde):
            raise UserError(
                "objective.koleo, objective.kde: expected at least 2 tiles per process and part, "
                f"found {share}; raise batch_size or lower accumulate"
            )


@dataclass
class OptimiserKeys:
    """The optimiser and the teacher's average; durations are in epochs."""

    optimizer: str = key("adamw", "optimiser", choices=("adamw", "sgd"))
    lr: float = key(5e-4, "learning rate; of a batch of 256, it grows with the batch", least=0)
    min_lr: float = key(1e-6, "learning rate at the end of the run", least=0)
    warmup: float = key(10.0, "epochs of linear warm-up of the learning rate", least=0)
    weight_decay: float = key(0.04, "weight decay; at the beginning", least=0)
    weight_decay_end: float = key(0.4, "weight decay at the end of the run", least=0)
    clip_norm: float = key(3.0, "largest L2 norm of the gradients of a step; 0: any", least=0)
    clip_each: bool = key(
        True, "clip the gradient of each parameter on its own, as DINO; else of all together"
    )
    freeze_last_layer: float = key(
        1.0, "epochs in which the head's prototypes stay as they are", least=0
    )
    teacher_momentum: float = key(
        0.996, "share of the teacher that a step keeps, at the beginning; it ends at 1"
    )

    def schedules(
        self, steps: int, epochs: int, batch_size: int, loss: LossKeys
    ) -> DistillationSchedules:
        """The values of a run of `epochs` epochs with `steps` steps each."""
        if not 0 <= self.teacher_momentum <= 1:
            raise UserError(
                f"training.teacher_momentum={self.teacher_momentum:g}: expected a share, 0 to 1"
            )

        if self.warmup >= epochs:
            raise UserError(
                f"training.warmup={self.warmup:g}: expected fewer epochs than epochs={epochs}, "
                "else the learning rate never gets to training.lr; lower it"
            )

        def count(duration: float) -> int:
            return round(duration * steps)

        return DistillationSchedules(
            steps=steps * epochs,
            lr=(scale_lr(self.lr, batch_size), self.min_lr),
            weight_decay=(self.weight_decay, self.weight_decay_end),
            momentum=self.teacher_momentum,
            temperature=loss.temperatures,
            warmup=count(self.warmup),
            temperature_warmup=count(loss.temperature_warmup),
            freeze=count(self.freeze_last_layer),
        )
