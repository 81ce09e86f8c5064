"""CLAM: the smooth SVM against its definition over all subsets, attention and instance loss against
loops.
"""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from mil.benchmark import Config as BenchmarkConfig
from mil.benchmark import main as benchmark_main
from mil.losses.smooth_svm import smooth_top1_svm
from mil.models import check_options
from mil.models.clam import CLAM
from mil.train import Config, main
from mil.training.engine import load_trained_model, training_loss
from wsi_common.config import load_config
from wsi_common.errors import UserError

BAG = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def smooth_top_k(scores: list[float], y: int, k: int, tau: float) -> float:
    """Berrada et al.: log-sum-exp over all k-subsets, with a margin where y is missing."""

    def mean(chosen: tuple[int, ...]) -> float:
        return sum(scores[j] for j in chosen) / k

    subsets = list(combinations(range(len(scores)), k))
    every = sum(math.exp(((y not in s) + mean(s)) / tau) for s in subsets)
    true = sum(math.exp(mean(s) / tau) for s in subsets if y in s)
    return tau * (math.log(every) - math.log(true))


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_smooth_svm_is_its_definition(classes: int, tau: float):
    # near enough to each other for the smooth part
    scores = 0.4 * torch.randn(
        20, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    targets = torch.arange(20) % classes
    expected = (
        sum(
            smooth_top_k(row.tolist(), int(y), 1, tau)
            for row, y in zip(scores, targets, strict=True)
        )
        / 20
    )
    assert float(smooth_top1_svm(scores, targets, tau=tau)) == pytest.approx(expected, abs=1e-6)


def test_smooth_svm_is_softplus_of_two_classes_and_hard_when_far_apart():
    near, far = torch.tensor([[0.3, -0.2]]), torch.tensor([[8.0, 1.0]])  # ln 1000 = 6.9
    assert float(smooth_top1_svm(near, torch.tensor([0]))) == pytest.approx(
        math.log1p(math.exp(1 - 0.5)), abs=1e-6
    )
    assert float(smooth_top1_svm(far, torch.tensor([0]))) == 0.0
    assert float(smooth_top1_svm(far, torch.tensor([1]))) == pytest.approx(8.0)
    # far apart is in units of tau: 4 of 0.5 are 8, of 2 they are 2
    middle = torch.tensor([[5.0, 1.0]])
    assert float(smooth_top1_svm(middle, torch.tensor([0]), tau=0.5)) == 0.0
    assert float(smooth_top1_svm(far, torch.tensor([0]), tau=2.0)) == pytest.approx(
        2 * math.log1p(math.exp(-3)), rel=1e-5
    )
    both = torch.cat([near, far])
    mean = (math.log1p(math.exp(0.5)) + 8.0) / 2
    assert float(smooth_top1_svm(both, torch.tensor([0, 1]))) == pytest.approx(mean, abs=1e-6)


def maps_by_hand(model: CLAM) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded tiles (N, F) and attention maps (K, N), tile by tile."""
    h = torch.stack([torch.relu(model.embed[0].weight @ x + model.embed[0].bias) for x in BAG])
    raw = []
    for t in h:
        gate = torch.sigmoid(model.gate[0].weight @ t + model.gate[0].bias)
        raw.append(
            model.score.weight
            @ (torch.tanh(model.attend[0].weight @ t + model.attend[0].bias) * gate)
            + model.score.bias
        )
    weights = torch.stack(raw).exp()
    return h, (weights / weights.sum(0)).T


@torch.no_grad()
@pytest.mark.parametrize("branches", [False, True])
def test_logits_and_attention(branches: bool):
    torch.manual_seed(2)
    model = CLAM(6, 3, branches=branches, hidden=16, attention=8).eval()
    h, a = maps_by_hand(model)
    assert len(a) == (3 if branches else 1)
    logits = [
        model.head.weight[c] @ (a[c if branches else 0] @ h) + model.head.bias[c] for c in range(3)
    ]
    output = model(BAG)
    torch.testing.assert_close(output.logits, torch.stack(logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.attention,
        a[int(torch.stack(logits).argmax()) if branches else 0],
        rtol=1e-5,
        atol=1e-6,
    )


# classes, what the model is told, the option, whether the other classes' instance classifiers learn
CASES = [
    (3, target, option, option)
    for target in (1, torch.tensor([1.0, 0.0, 1.0]))
    for option in (False, True)
]
CASES += [
    (3, 1, None, True),
    (2, 1, None, False),
    (2, 1, True, True),
    (3, torch.tensor([1.0, 0.0, 1.0]), None, False),
]


@pytest.mark.parametrize(("classes", "target", "option", "subtyping"), CASES)
@pytest.mark.parametrize("branches", [False, True])
def test_loss_is_bag_and_instance_loss(
    branches: bool, classes: int, target: int | torch.Tensor, option: bool | None, subtyping: bool
):
    torch.manual_seed(2)
    settings = {"branches": branches, "hidden": 16, "attention": 8, "instances": 4}
    model = CLAM(6, classes, dropout=0.0, subtyping=option, **settings).train()
    h, a = maps_by_hand(model)
    here = {1} if isinstance(target, int) else {0, 2}
    total = torch.zeros(())
    for c in range(classes):
        order = sorted(range(12), key=lambda n: -float(a.detach()[c if branches else 0][n]))
        said = (
            [(n, 1) for n in order[:4]] + [(n, 0) for n in order[-4:]]
            if c in here
            else [(n, 0) for n in order[:4]]
        )
        if c not in here and not subtyping:
            continue
        losses = []
        for n, label in said:
            s = model.instance_heads[c].weight @ h[n] + model.instance_heads[c].bias
            losses.append(torch.log1p(torch.exp(1 + s[1 - label] - s[label])))
        total = total + sum(losses) / len(losses)
    total = total / classes if subtyping else total
    output = model(BAG, None, target)
    torch.testing.assert_close(output.auxiliary, 0.3 * total, rtol=1e-5, atol=1e-6)
    if isinstance(target, int):
        expected = 0.7 * cross_entropy(output.logits[None], torch.tensor([1])) + 0.3 * total
        torch.testing.assert_close(training_loss(output, 1), expected, rtol=1e-5, atol=1e-6)
    output.auxiliary.backward()
    assert model.embed[0].weight.grad.any()  # tiles are not detached


def test_published_sizes():
    """The authors' small model: 790,791 parameters with two classes on 1,024 wide features."""
    model = CLAM(1024, 2)
    assert sum(p.numel() for p in model.parameters()) == 790_791
    assert (model.instances, model.bag_weight, model.embed[2].dropped) == (8, 0.7, 64)


def test_bags_smaller_than_the_number_of_instances_train():
    model = CLAM(6, 2, hidden=16, attention=8, instances=8).train()
    for n in (1, 3, 9):
        assert torch.isfinite(model(BAG[:n], None, 1).auxiliary)


def test_attention_dropout_follows_the_switch():
    assert (
        CLAM(6, 2, dropout=0.6).attend[2].dropped == 64
        and CLAM(6, 2, dropout=0.0).attend[2].dropped == 0
    )


def test_subtyping_is_by_task_where_it_is_not_given():
    assert CLAM(6, 3).subtyping is None and check_options("clam_mb", {"subtyping": None}) == {
        "subtyping": None
    }
    with pytest.raises(
        UserError, match="options of clam_sb: subtyping: expected bool or null, found 'yes'"
    ):
        check_options("clam_sb", {"subtyping": "yes"})


@pytest.mark.process
def test_subtyping_goes_through_training_and_benchmark(make_cohort, tmp_path: Path):
    cohort, small = make_cohort(), {"hidden": 16, "attention": 8, "instances": 3}
    shared = [
        f"labels={cohort}/labels.csv",
        "device=cpu",
        "folds=2",
        "training.epochs=2",
        "dropout=0.0",
    ]
    said = {}
    for given in (None, False, True):
        output, options = (
            tmp_path / str(given),
            small | ({} if given is None else {"subtyping": given}),
        )
        more = [
            f"features={cohort}/bags",
            f"output={output}",
            "model=clam_sb",
            f"options={json.dumps(options)}",
        ]
        assert main(load_config(Config, [*shared, *more])) is None
        said[given] = (output / "predictions.csv").read_text()
        model, content = load_trained_model(output / "checkpoint_best.pt", torch.device("cpu"))
        assert model.subtyping is given and content["config"]["network"].get("subtyping") is given
    assert said[None] == said[False] != said[True]  # two classes
    options = json.dumps({"clam_sb": small | {"subtyping": True}})
    more = [
        f"features=[{cohort}/bags]",
        f"output={tmp_path}/all",
        "models=[clam_sb]",
        f"options={options}",
    ]
    more += ["headline=clam_sb", "seeds=[2024]", "resamples=20", "isolated=false"]
    assert benchmark_main(load_config(BenchmarkConfig, [*shared, *more])) == 0
    run = tmp_path / "all" / "runs" / "bags" / "clam_sb" / "seed2024_fold0"
    assert (run / "predictions.csv").read_text() == said[True]
