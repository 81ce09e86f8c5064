"""A step of pre-training against DINO's, written out plainly on the same views, in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patch_encoder.pretrain_dino import (
    Config,
    PretrainingRun,
    add_gradients,
    cut_views,
)
from patch_encoder.pretraining.keys import LossKeys, OptimiserKeys, PyramidKeys
from patch_encoder.pretraining.monitoring import WINDOW, RecentValues
from patch_encoder.pretraining.objective import Objective
from patch_encoder.pretraining.state import DistillationState, make_groups
from patch_encoder.selfdistill.head import DINOHead
from patch_encoder.selfdistill.losses.koleo import koleo_loss
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.selfdistill.views import Views
from patch_encoder.tile_stream.windows import StreamBatch
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.optim import make_optimizer
from wsi_common.step_timer import StepTimes

STEPS, TILES, WIDTH, PROTOTYPES = 20, 6, 10, 16
LR, MIN_LR, WARMUP, DECAY, DECAY_END, MOMENTUM = 0.02, 1e-3, 5, 0.04, 0.4, 0.9
CLIP, FREEZE, TEMPERATURE = 0.3, 4, 0.05
SETTINGS = {
    "lr": LR * 256 / TILES,  # grows with the batch
    "min_lr": MIN_LR,
    "warmup": WARMUP,
    "weight_decay": DECAY,
    "weight_decay_end": DECAY_END,
    "teacher_momentum": MOMENTUM,
    "clip_norm": CLIP,
    "freeze_last_layer": FREEZE,
}


class Flat(nn.Module):
    """A network over views of 4 and of 2 px."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))))


def make_networks() -> SelfDistilled:
    torch.manual_seed(0)
    head = DINOHead(WIDTH, PROTOTYPES, 12, 5)
    for parameter in head.parameters():  # DINO's start is next to 0, where directions are noise
        if parameter.requires_grad and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    return SelfDistilled(Flat(), head).double()


def make_batches() -> list[Views]:
    generator = torch.Generator().manual_seed(1)

    def view(side: int) -> Tensor:
        return torch.randn(TILES, 3, side, side, dtype=torch.float64, generator=generator)

    batches = []
    for _ in range(STEPS):
        seen = [view(4), view(4)]
        batches.append(Views(seen, [seen[0], -seen[1]], view(4), [view(2) for _ in range(3)]))
    return batches


def cosine_table(base: float, final: float, warmup: int) -> np.ndarray:
    left = np.arange(STEPS - warmup)
    rest = final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))
    return np.concatenate([np.linspace(0, base, warmup), rest])


def pair_loss(seen: list[Tensor], answers: list[Tensor], centre: Tensor) -> Tensor:
    """Cross-entropies of all pairs of different views."""
    terms = []
    for u, target in enumerate(seen):
        q = ((target - centre) / TEMPERATURE).softmax(-1)
        for v, answer in enumerate(answers):
            if u != v:
                terms.append((-q * (answer / 0.1).log_softmax(-1)).sum(-1).mean())
    return torch.stack(terms).mean()


def clip_and_freeze(student: nn.Module, step: int) -> None:
    for name, p in student.named_parameters():
        if p.grad is None:
            continue
        factor = CLIP / (p.grad.norm(2) + 1e-6)
        if factor < 1:
            p.grad.mul_(factor)
        if step < FREEZE and "last_layer" in name:
            p.grad = None


def plain_dino(student: SelfDistilled, batches: list[Views]) -> tuple[nn.Module, nn.Module, Tensor]:
    """`main_dino.py` on given views: student, teacher and centre after all steps."""
    teacher = copy.deepcopy(student)
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    plain = [n for n in names if n.endswith("bias") or student.get_parameter(n).ndim == 1]
    groups = ([n for n in names if n not in plain], plain)
    decayed, other = ({"params": [student.get_parameter(n) for n in group]} for group in groups)
    optimizer = torch.optim.AdamW([decayed, {**other, "weight_decay": 0.0}])
    rates, decays = cosine_table(LR, MIN_LR, WARMUP), cosine_table(DECAY, DECAY_END, 0)
    momenta = cosine_table(MOMENTUM, 1.0, 0)
    centre = torch.zeros(1, PROTOTYPES, dtype=torch.float64)
    for step, views in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.param_groups[0]["weight_decay"] = decays[step]
        with torch.no_grad():
            seen = [teacher([view])[0] for view in views.global_views]
        assert views.context_view is not None
        shown = [*views.student_global_views, views.context_view, *views.local_views]
        optimizer.zero_grad()
        pair_loss(seen, [student([view])[0] for view in shown], centre).backward()
        clip_and_freeze(student, step)
        optimizer.step()
        centre = centre * 0.9 + torch.cat(seen).mean(0, keepdim=True) * 0.1
        with torch.no_grad():
            for q, p in zip(teacher.parameters(), student.parameters(), strict=True):
                q.mul_(momenta[step]).add_((1 - momenta[step]) * p)
    return student, teacher, centre[0]


def make_job(accumulate: int = 1, **loss: object) -> PretrainingRun:
    settings = [f"training.{name}={value}" for name, value in SETTINGS.items()]
    settings += [f"objective.{name}={value}" for name, value in loss.items()]
    settings += [f"batch_size={TILES}", f"accumulate={accumulate}", "slides=.", "output=."]
    config = load_config(Config, settings)
    schedules = config.training.schedules(1, STEPS, TILES, config.objective)
    world = World(0, 1, torch.device("cpu"))
    objective = config.objective.build()
    return PretrainingRun(  # type: ignore[arg-type]
        config, world, None, "fp32", None, objective, schedules, None, 1, None, None
    )


def make_state(job: PretrainingRun, student: SelfDistilled) -> DistillationState:
    optimizer = make_optimizer("adamw", make_groups(student), 1.0, 0.0)
    centre = torch.zeros(PROTOTYPES, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return DistillationState(student, student, make_teacher(student), centre, optimizer, scaler)


def train(job: PretrainingRun, state: DistillationState, batches: list[Views]) -> None:
    for views in batches:
        values = job.schedules.at(state.step)
        state.set_values(values)
        state.optimizer.zero_grad(set_to_none=True)
        add_gradients(job, state, views, values, StepTimes(job.world.device, TILES))
        state.apply_gradients(values, job.config.training.clip_norm, True)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_twenty_steps_are_those_of_dino(accumulate: int) -> None:
    job = make_job(accumulate, temperature=TEMPERATURE, temperature_end=TEMPERATURE)
    state = make_state(job, make_networks())
    batches = make_batches()
    train(job, state, batches)
    student, teacher, centre = plain_dino(make_networks(), batches)
    start = make_networks().state_dict()
    close = {"rtol": 1e-9, "atol": 1e-12}
    for ours, theirs in ((state.student, student), (state.teacher, teacher)):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, **close)
            assert name.endswith("weight_g") or not torch.allclose(value, start[name], rtol=1e-3)
    torch.testing.assert_close(state.centre, centre, **close)


def test_terms_are_weighted_and_of_the_global_views() -> None:
    views = make_batches()[0]
    terms = {}
    for name, weight in (("plain", {}), ("spread", {"koleo": 0.1, "kde": 0.05})):
        job = make_job(**weight)
        state = make_state(job, make_networks())
        times = StepTimes(job.world.device, TILES)
        terms[name] = add_gradients(job, state, views, job.schedules.at(0), times)[0]
    spread = terms["spread"]
    assert terms["plain"]["loss"] == terms["plain"]["dino"] == spread["dino"]
    expected = spread["dino"] + 0.1 * spread["koleo"] + 0.05 * spread["kde"]
    torch.testing.assert_close(spread["loss"], expected)
    features = [make_networks()([view])[1].detach() for view in views.student_global_views]
    torch.testing.assert_close(spread["koleo"], sum(koleo_loss(part) for part in features))


def test_kl_is_what_the_student_could_still_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator).softmax(dim=-1)
    student = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    features = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    terms = Objective().compute_terms(student.flatten(0, 1), features, targets, 2)
    p = (student / 0.1).log_softmax(dim=-1)
    other = torch.nn.functional.kl_div(p.flip(0), targets, reduction="sum") / 6
    torch.testing.assert_close(terms["kl"], other)


def test_sinkhorn_takes_the_whole_batch_whatever_the_parts() -> None:
    views, found = make_batches()[0], []
    for accumulate in (1, 2):
        job = make_job(accumulate, targets="sinkhorn")
        state = make_state(job, make_networks())
        times = StepTimes(job.world.device, TILES)
        found.append(add_gradients(job, state, views, job.schedules.at(0), times))
        assert not state.centre.any()
    torch.testing.assert_close(found[0][0]["loss"], found[1][0]["loss"])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_loss_that_is_no_number_names_the_step() -> None:
    job, views = make_job(), make_batches()[0]
    views.local_views[0][0] = math.nan
    state = make_state(job, make_networks())
    times = StepTimes(job.world.device, TILES)
    with pytest.raises(UserError, match="epoch 1 step 1: expected a finite loss, found nan"):
        add_gradients(job, state, views, job.schedules.at(0), times)


HEALTHY = {"teacher_entropy": 1.0, "target_information": 1.0, "feature_std": 0.5}
COLLAPSED = {
    "one prototype": {"teacher_entropy": 1e-6, "target_information": 0.0},
    "uniform": {"teacher_entropy": math.log(64), "target_information": 0.0},
    "alike": {"feature_std": 1e-4},
}


@pytest.mark.parametrize("kind", list(COLLAPSED))
def test_a_collapse_stops_the_run_with_one_line_after_the_warm_up(kind: str) -> None:
    recent = RecentValues(prototypes=64, after=100)
    collapsed = {**HEALTHY, **COLLAPSED[kind]}
    for step in range(0, 100, 5):
        recent.add(collapsed, step)
    for step in range(100, 100 + WINDOW - 1):
        recent.add(collapsed, step)
    with pytest.raises(UserError, match=f"step {100 + WINDOW}: .* collapse: .*{kind}") as error:
        recent.add(collapsed, 100 + WINDOW - 1)
    assert "\n" not in str(error.value)


def test_a_healthy_run_goes_on() -> None:
    recent = RecentValues(prototypes=64, after=0)
    for step in range(50):
        recent.add(HEALTHY, step)
    assert len(recent.rows) == WINDOW


def test_losses_and_schedules_refuse_what_cannot_be() -> None:
    with pytest.raises(UserError, match="objective.temperature=0: expected a value above 0"):
        LossKeys(temperature=0).check(4)
    with pytest.raises(UserError, match="expected at least 2 tiles per process and part, found 1"):
        LossKeys(koleo=0.1).check(1)
    with pytest.raises(UserError, match="training.warmup=10: expected fewer epochs than epochs=6"):
        OptimiserKeys().schedules(4, 6, 8, LossKeys())
    with pytest.raises(UserError, match="teacher_momentum=1.5: expected a share"):
        OptimiserKeys(teacher_momentum=1.5).schedules(1, 1, 8, LossKeys())
    config = load_config(Config, ["epoch_tiles=10", "batch_size=16", "slides=.", "output=."])
    with pytest.raises(UserError, match="epoch_tiles=10: expected at least batch_size=16"):
        config.count_steps([])


def test_a_temperature_alone_is_that_of_the_whole_run() -> None:
    schedules = OptimiserKeys(warmup=0).schedules(2, 3, 8, LossKeys(temperature=0.07))
    assert [schedules.at(step).temperature for step in (0, 5)] == [0.07, 0.07]
    rising = LossKeys(temperature=0.04, temperature_end=0.07, temperature_warmup=1)
    schedules = OptimiserKeys(warmup=0).schedules(2, 3, 8, rising)
    found = [schedules.at(step).temperature for step in (0, 1, 2, 5)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_pyramid_view_is_drawn_for_a_share_of_the_steps() -> None:
    keys = PyramidKeys(factor=2, probability=0.3)
    drawn = [keys.is_drawn(7, step) for step in range(4000)]
    assert abs(np.mean(drawn) - 0.3) < 0.03 and drawn[:50] != [
        keys.is_drawn(8, step) for step in range(50)
    ]
    assert all(PyramidKeys(factor=2).is_drawn(7, step) for step in range(50))
    assert not any(PyramidKeys(factor=2, probability=0).is_drawn(7, step) for step in range(50))
    for refused, said in (
        (PyramidKeys(factor=1), "pyramid.factor=1: expected a wider field"),
        (PyramidKeys(factor=2, probability=1.5), "pyramid.probability=1.5: expected a share"),
        (PyramidKeys(teacher=True), "pyramid.teacher=true: expected pyramid.factor"),
    ):
        with pytest.raises(UserError, match=said):
            refused.check()


def test_steps_without_the_pyramid_view_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    job, tiles = make_job(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    job.recipe = ViewRecipe(global_size=8, local_size=4, local_number=1)
    batch = StreamBatch(tiles, tiles, torch.arange(2), [0, 0], [])
    for probability, seen in ((1.0, True), (0.0, False)):
        job.config.pyramid.probability = probability
        assert (cut_views(job, batch, 3).context_view is not None) == seen
