"""Losses of the detector against torchvision, brute force and hand-made cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from detection_kd.losses import matcher
from detection_kd.losses.boxes import (
    cxcywh_to_xyxy,
    generalized_iou,
    pairwise_generalized_iou,
)
from detection_kd.losses.matcher import focal_loss, match_queries, matching_cost
from detection_kd.losses.set_criterion import (
    DetectionTargets,
    denoising_losses,
    detection_losses,
    layer_losses,
    match_groups,
    match_proposals,
    proposal_losses,
    weighted_sum,
)


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        (
            torch.rand(count, 2, generator=generator),
            torch.rand(count, 2, generator=generator) * 0.4 + 0.01,
        ),
        1,
    )


def test_boxes_by_centre_become_boxes_by_corners() -> None:
    assert cxcywh_to_xyxy(torch.tensor([[3.0, 5.0, 2.0, 4.0]])).tolist() == [[2.0, 3.0, 4.0, 7.0]]
    boxes = random_boxes(5)
    corners = cxcywh_to_xyxy(boxes)
    low, high = corners[:, :2], corners[:, 2:]
    torch.testing.assert_close(torch.cat(((low + high) / 2, high - low), -1), boxes)


def test_generalized_iou_equals_torchvision() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(6)), cxcywh_to_xyxy(random_boxes(4, seed=1))
    torch.testing.assert_close(
        generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        pairwise_generalized_iou(a, b), generalized_box_iou(a, b), atol=1e-6, rtol=1e-5
    )


def test_generalized_iou_of_boxes_without_area_is_finite() -> None:
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    values = torch.cat([generalized_iou(point, point), generalized_iou(point, box)])
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(point.grad).all()
    assert values[1] == 0  # nothing in common, the hull is the box itself


def test_focal_loss_equals_torchvision() -> None:
    logits, targets = torch.randn(50), (torch.rand(50) > 0.7).float()
    torch.testing.assert_close(focal_loss(logits, targets), sigmoid_focal_loss(logits, targets))


def test_matching_cost_is_the_published_formula() -> None:
    logits, boxes, target = (
        torch.tensor([[0.3, -1.2]]),
        torch.tensor([[0.5, 0.5, 0.2, 0.2]]),
        torch.tensor([[0.6, 0.5, 0.2, 0.2]]),
    )
    p = torch.sigmoid(torch.tensor(-1.2))
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    expected = 2 * focal + 5 * 0.1 + 2 * -(1 / 3)  # IoU 0.02 / 0.06, hull = union
    torch.testing.assert_close(
        matching_cost(logits, boxes, torch.tensor([1]), target)[0, 0], expected
    )


@pytest.mark.parametrize(
    "queries", [2, 5], ids=["fewer queries than boxes", "more queries than boxes"]
)
def test_match_equals_brute_force(queries: int) -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 2, queries, 3), random_boxes(4 * queries).view(2, 2, queries, 4)
    labels = [torch.tensor([0, 2, 1]), torch.tensor([1])]
    targets = [random_boxes(3, 5), random_boxes(1, 6)]
    found = match_queries(logits, boxes, labels, targets)
    for layer, image in itertools.product(range(2), range(2)):
        cost = matching_cost(
            logits[layer, image], boxes[layer, image], labels[image], targets[image]
        )
        n = min(cost.shape)
        best = min(
            sum(cost[t, q] for t, q in zip(rows, columns))
            for rows in itertools.permutations(range(cost.shape[0]), n)
            for columns in itertools.combinations(range(cost.shape[1]), n)
        )
        rows, columns = found[layer][image]
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == n
        torch.testing.assert_close(cost[columns, rows].sum(), best)


def test_both_ways_to_the_costs_and_threads_give_one_matching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 3, 20, 3), random_boxes(120).view(2, 3, 20, 4)
    labels, targets = (
        [torch.randint(3, (n,)) for n in (7, 0, 25)],
        [random_boxes(n, n) for n in (7, 0, 25)],
    )
    inputs = (logits, boxes, labels, targets)
    for a, b in zip(
        matcher._costs_on_device(*inputs), matcher._costs_on_host(*inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    alone = match_queries(*inputs)
    monkeypatch.setattr(matcher, "WORTH_THREADS", 0)
    together = match_queries(*inputs)
    pairs = zip(itertools.chain(*alone), itertools.chain(*together), strict=True)
    assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two))
    assert [len(found) for found, _ in alone[0]] == [7, 0, 20]


def test_match_of_images_without_boxes_and_of_diverged_predictions() -> None:
    empty, no_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    rows, columns = match_queries(
        torch.randn(1, 1, 4, 2), torch.rand(1, 1, 4, 4), [no_labels], [empty]
    )[0][0]
    assert len(rows) == len(columns) == 0
    rows, _ = match_queries(
        torch.full((1, 1, 4, 2), float("nan")),
        torch.rand(1, 1, 4, 4),
        [torch.tensor([0])],
        [random_boxes(1)],
    )[0][0]
    assert len(rows) == 1


def one_image() -> tuple[torch.Tensor, torch.Tensor, DetectionTargets]:
    """Two queries, two classes, one box of class 1 that query 1 matches."""
    logits = torch.tensor([[[-1.0, -2.0], [0.5, 1.5]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]]])
    return (
        logits,
        boxes,
        DetectionTargets([torch.tensor([1])], [torch.tensor([[0.6, 0.5, 0.2, 0.4]])]),
    )


def matched_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    targets: DetectionTargets,
    num_boxes: float,
    groups: int = 1,
) -> dict[str, torch.Tensor]:
    """Matching and losses of all layers."""
    return detection_losses(
        logits, boxes, match_groups(logits, boxes, targets, groups), targets, num_boxes
    )


def test_every_term_by_hand() -> None:
    logits, boxes, targets = one_image()
    terms = layer_losses(
        logits, boxes, [(torch.tensor([1]), torch.tensor([0]))], targets, num_boxes=2.0
    )
    classes = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(terms["class"], sigmoid_focal_loss(logits, classes).sum() / 2)
    torch.testing.assert_close(terms["box"], torch.tensor((0.1 + 0.2) / 2))
    # overlap 0.1 x 0.2, union 0.04 + 0.08 - 0.02, hull 0.3 x 0.4
    torch.testing.assert_close(terms["giou"], torch.tensor((1 - (0.02 / 0.1 - 0.02 / 0.12)) / 2))


def test_every_decoder_layer_counts_with_its_weight() -> None:
    logits, boxes, targets = one_image()
    terms = matched_losses(
        torch.stack((logits + 1, logits)), torch.stack((boxes - 0.05, boxes)), targets, 1.0
    )
    assert set(terms) == {"class", "box", "giou", "class_0", "box_0", "giou_0"}
    assert terms["class"] != terms["class_0"] and terms["box"] != terms["box_0"]
    only_last = matched_losses(logits[None], boxes[None], targets, 1.0)
    assert all(terms[name] == only_last[name] for name in only_last)
    expected = sum(
        {"class": 2, "box": 5, "giou": 2}[name.split("_")[0]] * value
        for name, value in terms.items()
    )
    torch.testing.assert_close(weighted_sum(terms), expected)


def test_proposals_count_every_class_as_the_first() -> None:
    logits, boxes, targets = one_image()
    terms = proposal_losses(logits, boxes, match_proposals(logits, boxes, targets), targets, 1.0)
    as_first = DetectionTargets([torch.tensor([0])], targets.boxes)
    expected = matched_losses(logits[None], boxes[None], as_first, 1.0)
    assert {name: value.item() for name, value in terms.items()} == {
        f"{name}_enc": value.item() for name, value in expected.items()
    }
    assert terms["class_enc"] != matched_losses(logits[None], boxes[None], targets, 1.0)["class"]


def test_batch_equals_its_images_one_by_one() -> None:
    torch.manual_seed(1)
    logits, boxes = torch.randn(1, 3, 6, 2), random_boxes(18).view(1, 3, 6, 4)
    labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]
    targets = [random_boxes(2, 3), torch.zeros(0, 4), random_boxes(1, 4)]
    together = matched_losses(logits, boxes, DetectionTargets(labels, targets), 3.0)
    for name, value in together.items():
        alone = [
            matched_losses(
                logits[:, i : i + 1],
                boxes[:, i : i + 1],
                DetectionTargets(labels[i : i + 1], targets[i : i + 1]),
                3.0,
            )[name]
            for i in range(3)
        ]
        torch.testing.assert_close(value, torch.stack(alone).sum())


def test_images_without_boxes_still_reach_every_output() -> None:
    logits, boxes = (
        torch.randn(1, 2, 4, 2, requires_grad=True),
        torch.rand(1, 2, 4, 4, requires_grad=True),
    )
    nothing = DetectionTargets([torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0, 4)] * 2)
    terms = matched_losses(logits, boxes, nothing, 1.0)
    weighted_sum(terms).backward()
    assert terms["class"] > 0 and terms["box"] == 0 and terms["giou"] == 0
    assert (
        boxes.grad is not None and not boxes.grad.any()
    )  # a gradient of zeros, which DDP waits for


def test_groups_are_matched_apart_and_averaged() -> None:
    torch.manual_seed(2)
    logits, boxes = torch.randn(2, 2, 12, 2), random_boxes(48).view(2, 2, 12, 4)
    targets = DetectionTargets(
        [torch.tensor([0, 1]), torch.tensor([1])], [random_boxes(2, 3), random_boxes(1, 4)]
    )
    together = matched_losses(logits, boxes, targets, 3.0, groups=3)
    parts = [
        matched_losses(logits[:, :, i : i + 4], boxes[:, :, i : i + 4], targets, 3.0)
        for i in (0, 4, 8)
    ]
    assert together.keys() == parts[0].keys()
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).mean())
    assert together["box"] != matched_losses(logits, boxes, targets, 3.0)["box"]


def test_denoising_positives_find_their_box_and_padding_counts_nowhere() -> None:
    torch.manual_seed(3)
    logits, boxes = torch.randn(2, 2, 4, 2), random_boxes(16).view(2, 2, 4, 4)
    targets = DetectionTargets(
        [torch.tensor([1, 0]), torch.tensor([1])], [random_boxes(2, 5), random_boxes(1, 6)]
    )
    counted = torch.tensor(
        [[True, True, True, True], [True, False, True, False]]
    )  # positives 0 and 1, negatives 2 and 3
    matches = [(torch.tensor([0, 1]), torch.tensor([0, 1])), (torch.tensor([0]), torch.tensor([0]))]
    terms = denoising_losses(logits, boxes, matches, counted, targets, 3.0)
    assert set(terms) == {"class_dn", "box_dn", "giou_dn", "class_dn_0", "box_dn_0", "giou_dn_0"}
    classes = torch.zeros(2, 4, 2)
    classes[0, 0, 1] = classes[0, 1, 0] = classes[1, 0, 1] = 1
    for layer, suffix in ((0, "_0"), (1, "")):
        expected = sigmoid_focal_loss(logits[layer], classes)[counted].sum() / 3
        torch.testing.assert_close(terms["class_dn" + suffix], expected)
        distance = (boxes[layer, 0, :2] - targets.boxes[0]).abs().sum() + (
            boxes[layer, 1, 0] - targets.boxes[1][0]
        ).abs().sum()
        torch.testing.assert_close(terms["box_dn" + suffix], distance / 3)
    total = sum(
        {"class": 2, "box": 5, "giou": 2}[name.split("_")[0]] * value
        for name, value in terms.items()
    )
    torch.testing.assert_close(weighted_sum(terms), total)
