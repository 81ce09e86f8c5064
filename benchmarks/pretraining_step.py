"""A step of pre-training: milliseconds of DINO's loop and of ours, on the same views, interleaved;
and the memory of a short and of a long training.

Both train the same network on the same views, which are made beforehand: the teacher on two global
views, the student on all, the loss over pairs of views, clipping by parameter, AdamW, the teacher's
average, the centre. The plain loop does what `main_dino.py` does, with a log-softmax per pair and
Python loops over parameters. In a round both take turns. The figures are medians over rounds, and
the ratio is the median of the rounds' ratios. The parts of our step show where its time goes.

For memory, `pretrain_dino` trains a tiny network from a slide, each time in a process of its own
that reads, makes views, steps, logs and saves. What a step keeps would show as a larger peak of the
longer training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.pretraining_data import draw_pixels, make_corpus, write_tiff
from benchmarks.pretraining_views import draw_tiles
from benchmarks.rounds import clock, measure_ratios, say
from patch_encoder.pretrain_dino import Config, PretrainingRun, add_gradients, main
from patch_encoder.pretraining.state import DistillationState, make_groups
from patch_encoder.selfdistill.student import SelfDistilled, build_student, make_teacher
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.selfdistill.views import Views, make_views
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.memory import peak_memory
from wsi_common.optim import make_optimizer
from wsi_common.step_timer import StepTimes

PLAIN, OURS = "plain DINO loop", "ours"
EPOCH = 10  # steps of an epoch, where memory is measured
CLIP, MOMENTUM, TEMPERATURE = 3.0, 0.996, 0.04
# network, prototypes, and sides of tile, global and local views
CASES = {
    "ResNet-10t, 64 px, K 1,024": ("timm:resnet10t", 1024, 128, 64, 32),
    "ViT-tiny/16, 64 px, K 16,384": ("vit_tiny", 16384, 128, 64, 32),
}


class PlainLoop:
    """DINO's step on given views, as its script writes it."""

    def __init__(self, student: SelfDistilled, prototypes: int) -> None:
        self.student, self.teacher = student, make_teacher(student)
        self.centre = torch.zeros(1, prototypes)
        decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in student.parameters() if p.requires_grad and p.ndim == 1]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def step(self, views: Views) -> None:
        """One step."""
        shown = [*views.student_global_views, *views.local_views]
        with torch.no_grad():
            seen = self.teacher(views.global_views)[0]
        loss = self._loss(self.student(shown)[0], seen, len(shown))
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = CLIP / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            for q, k in zip(self.teacher.parameters(), self.student.parameters()):
                q.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * k.detach().data)

    def _loss(self, logits: Tensor, seen: Tensor, views: int) -> Tensor:
        answers = (logits / 0.1).chunk(views)
        targets = ((seen - self.centre) / TEMPERATURE).softmax(dim=-1).chunk(2)
        total, terms = torch.zeros(()), 0
        for u, target in enumerate(targets):
            for v, answer in enumerate(answers):
                if u != v:
                    total = total + torch.sum(-target * answer.log_softmax(dim=-1), dim=-1).mean()
                    terms += 1
        self.centre = self.centre * 0.9 + seen.mean(dim=0, keepdim=True) * 0.1
        return total / terms


class OurLoop:
    """The step of `pretrain_dino`."""

    def __init__(self, student: SelfDistilled, prototypes: int, tiles: int) -> None:
        given = ["slides=.", "output=.", f"batch_size={tiles}", "training.warmup=0"]
        config = load_config(Config, [*given, "training.freeze_last_layer=0"])
        schedules = config.training.schedules(1, 10_000, tiles, config.objective)
        world, objective = World(0, 1, torch.device("cpu")), config.objective.build()
        self.job = PretrainingRun(
            config, world, None, "fp32", None, objective, schedules, None, 1, None, None
        )  # type: ignore[arg-type]
        optimizer = make_optimizer("adamw", make_groups(student), 1e-4, 0.04)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        networks = (student, student, make_teacher(student))
        self.state = DistillationState(*networks, torch.zeros(prototypes), optimizer, scaler)
        self.times = StepTimes(world.device, tiles)

    def step(self, views: Views) -> None:
        """One step."""
        self.times.mark("between")  # the other loop's turn
        state, values = self.state, self.job.schedules.at(self.state.step)
        state.set_values(values)
        state.optimizer.zero_grad(set_to_none=True)
        add_gradients(self.job, state, views, values, self.times)
        state.apply_gradients(values, CLIP, clip_each=True)
        self.times.mark("step")


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per step of each, and how many times as fast as the plain loop."""
    clocks = {name: partial(clock, call) for name, call in calls.items()}
    found = measure_ratios(clocks, PLAIN, rounds)
    return {name: {"ms/step": ms, "ratio": ratio} for name, (ms, ratio) in found.items()}


def run_case(
    arch: str, prototypes: int, sides: tuple[int, int, int], tiles: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Figures of one network."""
    side, large, small = sides
    recipe = ViewRecipe(global_size=large, local_size=small, local_number=4)
    views = make_views(draw_tiles(tiles, side), None, torch.arange(tiles), recipe, 0)
    torch.manual_seed(0)
    options = {"image_size": large, "drop_path": 0.0, "out_dim": prototypes}
    student = build_student(arch, **options, hidden_dim=512, bottleneck_dim=128)
    plain, ours = (
        PlainLoop(copy.deepcopy(student), prototypes),
        OurLoop(student, prototypes, tiles),
    )
    found = measure({PLAIN: lambda: plain.step(views), OURS: lambda: ours.step(views)}, rounds)
    parts = ours.times.whole()
    names = {
        "teacher": "teacher",
        "forward": "forward",
        "backward": "backward",
        "step": "optimiser",
    }
    found[OURS] |= {f"{text} ms": 1e3 * parts[f"time/{name}"] for name, text in names.items()}
    return found


def run_steps(tiles: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by network."""
    figures = {}
    for title, (arch, prototypes, *sides) in CASES.items():
        say(f"step: {title}")
        figures[title] = run_case(arch, prototypes, tuple(sides), tiles, rounds)
    return figures


def train_briefly(folder: Path, steps: int) -> int:
    """Train for so many steps, in epochs of `EPOCH`; the peak memory of this process, bytes."""
    torch.set_num_threads(1)
    network = ["arch=timm:test_vit", "out_dim=256", "hidden_dim=64", "bottleneck_dim=32"]
    views = ["global_size=32", "local_size=16", "local_number=2"]
    given = [f"slides={folder / 'slides'}", f"output={folder / str(steps)}", "tile_size=64"]
    given += [f"network.{key}" for key in network] + [f"views.{key}" for key in views]
    given += ["network.drop_path=0", "shuffle.grid=2", "training.warmup=0.5", "batch_size=8"]
    given += [f"epoch_tiles={8 * EPOCH}", f"epochs={steps // EPOCH}", "workers=0", "device=cpu"]
    assert main(load_config(Config, given)) == 0
    return peak_memory()


def run_memory(lengths: Sequence[int] = (50, 500)) -> dict[str, dict[str, dict[str, float]]]:
    """Peak memory of trainings of so many steps, in MB and as a share of the first one's."""
    peaks = []
    with TemporaryDirectory(prefix="pretraining_memory") as name:
        folder = Path(name)
        write_tiff(folder / "slide.tiff", draw_pixels(1024))
        make_corpus(folder / "slide.tiff", folder / "slides", 4)
        for steps in lengths:
            say(f"memory: {steps} steps")
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                peaks.append(pool.submit(train_briefly, folder, steps).result())
    rows = {
        f"{steps} steps": {"peak MB": peak / 1e6, "ratio": peak / peaks[0]}
        for steps, peak in zip(lengths, peaks, strict=True)
    }
    return {"a tiny ViT from a slide": rows}
