"""From regions to the goals of a batch: order, encoding, clusters, weights, parts and processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patch_encoder import pretrain_slpd
from patch_encoder.prototypes import encoding
from patch_encoder.prototypes.encoding import encode_regions
from patch_encoder.prototypes.keys import PrototypeKeys, PrototypeLossKeys
from patch_encoder.prototypes.objective import (
    PrototypeState,
    add_prototype_terms,
    make_prototype_goals,
)
from patch_encoder.prototypes.region_batches import choose_share, draw_order, read_batches
from patch_encoder.prototypes.region_vit import RegionViT
from patch_encoder.prototypes.slide_prototypes import (
    SlidePrototypes,
    centre_by_slide,
    find_slide_prototypes,
)
from patch_encoder.regions.region_set import make_region_set
from patch_encoder.regions.store import RamStore
from patch_encoder.selfdistill.head import DINOHead
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

COUNTS, SIDE, WIDTH = np.array([5, 4, 2]), 8, 6
CPU = torch.device("cpu")


@pytest.fixture
def store() -> RamStore:
    generator = torch.Generator().manual_seed(0)
    shape = (int(COUNTS.sum()), SIDE, SIDE)
    valid = torch.rand(shape, generator=generator) > 0.2
    features = torch.randn(*shape, WIDTH, generator=generator).half()
    regions = make_region_set(features, valid, ["a", "b", "c"], COUNTS.tolist())
    return RamStore(regions, tiles=features.flatten(0, 2))


@pytest.fixture
def teacher() -> SelfDistilled:
    torch.manual_seed(0)
    return make_teacher(SelfDistilled(RegionViT(WIDTH, 8, 1, 2, 7), DINOHead(8, 12, 8, 4)))


def test_processes_share_each_batch_and_an_epoch_has_every_region_once() -> None:
    order = draw_order(3, 1, 20)
    assert sorted(order) == list(range(20)) and not np.array_equal(order, draw_order(3, 2, 20))
    assert not np.array_equal(order, draw_order(4, 1, 20))
    one = [choose_share(order, step, 6, World(0, 1, CPU)) for step in range(3)]
    two = [[choose_share(order, step, 6, World(r, 2, CPU)) for r in (0, 1)] for step in range(3)]
    assert [list(part) for part in one] == [[*first, *second] for first, second in two]
    assert np.array_equal(np.concatenate(one), order[:18])


def test_batches_come_in_their_order(store: RamStore) -> None:
    wanted = [np.array([3, 1]), np.array([0, 10]), np.array([7, 2])]
    found = list(read_batches(store, wanted, CPU))
    assert [list(batch.ids) for batch in found] == [list(ids) for ids in wanted]
    for batch in found:
        assert torch.equal(batch.features, store.fetch(batch.ids)[0])
        assert torch.equal(batch.valid, store.fetch(batch.ids)[1])
    assert list(read_batches(store, [], CPU)) == []


@pytest.mark.parametrize("processes", [2, 6])
def test_embeddings_have_the_same_bits_on_any_number_of_processes(
    store: RamStore, teacher: SelfDistilled, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(encoding, "BLOCK", 3)
    teacher.train()
    whole = encode_regions(teacher, store, World(0, 1, CPU), "fp32")
    assert teacher.training and whole.features.shape == (11, 8)
    torch.testing.assert_close(whole.units.norm(dim=1), torch.ones(11))
    parts = [
        encode_regions(teacher, store, World(rank, processes, CPU), "fp32")
        for rank in range(processes)
    ]
    assert torch.equal(sum(part.features for part in parts), whole.features)
    assert torch.equal(sum(part.units for part in parts), whole.units)


def test_the_centre_of_regions_is_another_embedding(
    store: RamStore, teacher: SelfDistilled
) -> None:
    full, centre = (
        encode_regions(teacher, store, World(0, 1, CPU), "fp32", view).units
        for view in ("full", "center14")
    )
    assert full.shape == centre.shape and not torch.allclose(full, centre)


def find(keys: PrototypeKeys | None = None, cases: tuple[str, ...] = ("p", "q", "r")):
    generator = torch.Generator().manual_seed(1)
    units = torch.nn.functional.normalize(torch.randn(11, 4, generator=generator), dim=1)
    keys = keys or PrototypeKeys(clusters=2, min_regions=3)
    return units, find_slide_prototypes(units, COUNTS, cases, keys, 0)


def test_slide_means_are_taken_off_before_clustering() -> None:
    units, plain = find()
    centred = centre_by_slide(units, torch.from_numpy(COUNTS))
    assert (centred[:5].sum(0) - units[:5].sum(0)).abs().max() > 0.1
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(11))
    shifted = units + torch.randn(3, 4)[torch.from_numpy(np.repeat(range(3), COUNTS))]
    torch.testing.assert_close(centre_by_slide(shifted, torch.from_numpy(COUNTS)), centred)
    _, found = find(PrototypeKeys(clusters=2, min_regions=3, centre="slide"))
    assert not torch.equal(found.clusters.assignment, plain.clusters.assignment)
    # what the student predicts is the mean of a cluster where the head puts it, not less the slide
    for slide, members in ((0, slice(5)), (1, slice(5, 9))):
        for number in range(2):
            inside = units[members][found.clusters.assignment[members] == number]
            mean = torch.nn.functional.normalize(inside.sum(0), dim=0)
            torch.testing.assert_close(found.clusters.prototypes[slide, number], mean)
    assert not found.clusters.prototypes[2].any()


def test_a_checkpoint_gives_back_the_prototypes() -> None:
    found = find()[1]
    state = PrototypeState(found, {"intra": torch.ones(3)})
    again = PrototypeState()
    again.load_state_dict(state.state_dict(), CPU)
    assert isinstance(again.slides, SlidePrototypes)
    for part in ("clusters", "neighbours"):
        for name, value in vars(getattr(found, part)).items():
            assert torch.equal(value, getattr(getattr(again.slides, part), name))
    assert torch.equal(again.centres["intra"], torch.ones(3))
    again.load_state_dict(PrototypeState().state_dict(), CPU)
    assert again.slides is None and again.centres == {}


def test_what_is_watched_of_the_prototypes() -> None:
    found = find()[1].describe()
    assert found["prototypes/ignored_slides"] == 1 and found["prototypes/distinct_targets"] == 1
    sizes = found["prototypes/smallest_share"], found["prototypes/largest_share"]
    assert 0 < sizes[0] <= 0.5 <= sizes[1] < 1 and sum(sizes) == pytest.approx(1)
    nothing = find(PrototypeKeys(clusters=2, min_regions=9))[1].describe()
    assert nothing == {"prototypes/ignored_slides": 3}


def make_goals(state: PrototypeState, regions: list[int], **keys: float):
    layer = DINOHead(8, 12, 8, 4).last_layer
    ids = torch.tensor(regions)
    return make_prototype_goals(state, ids, layer, 0.1, PrototypeLossKeys(**keys), 0.9)


def test_goals_are_those_of_the_losses_that_are_on() -> None:
    state = PrototypeState()
    assert make_goals(state, [0, 6, 10]) == [] and state.centres == {}
    state.slides = find()[1]
    intra, inter = make_goals(state, [0, 6, 10])
    assert (intra.name, inter.name) == ("intra", "inter")
    assert intra.keep.tolist() == [[True, True, False]] == inter.keep.tolist()
    assert intra.count == 2 and state.centres.keys() == {"intra", "inter"}
    assert not torch.equal(state.centres["intra"], state.centres["inter"])
    assert [goal.name for goal in make_goals(state, [0], inter=0)] == ["intra"]
    assert [goal.name for goal in make_goals(state, [0], intra=0)] == ["inter"]


def test_a_batch_of_ignored_slides_changes_nothing() -> None:
    state = PrototypeState(find()[1], {"intra": torch.ones(12), "inter": torch.ones(12)})
    goals = make_goals(state, [9, 10])
    assert all(goal.count == 0 for goal in goals)
    assert all(torch.equal(centre, torch.ones(12)) for centre in state.centres.values())
    logits = torch.randn(3, 2, 12, requires_grad=True)
    terms = add(goals, logits, slice(0, 2), parts=1)
    assert terms["intra"] == terms["inter"] == 0 and terms["loss"] == 5
    terms["loss"].backward()
    assert not logits.grad.any()


def add(goals, logits, part, parts):
    settings = {"temperature": 0.1, "skip_first_view": False, "parts": parts}
    weights = {"intra": 0.5, "inter": 2.0}
    terms = {"loss": torch.tensor(5.0)}
    return add_prototype_terms(terms, logits, goals, part, weights=weights, **settings)


def test_parts_add_up_to_the_whole_step() -> None:
    state = PrototypeState(find()[1])
    goals = make_goals(state, [0, 9, 10, 6, 1, 3])  # the second part has more that are kept
    logits = torch.randn(3, 6, 12)
    whole = add(goals, logits, slice(0, 6), parts=1)
    expected = 5 + 0.5 * whole["intra"] + 2 * whole["inter"]
    torch.testing.assert_close(whole["loss"], expected)
    pieces = [slice(0, 3), slice(3, 6)]
    parts = [add(goals, logits[:, piece], piece, parts=2) for piece in pieces]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 2, value)


def test_clusters_are_due_every_so_many_epochs_from_the_first_on() -> None:
    keys = PrototypeKeys(start_epoch=2, every=3)
    assert [epoch for epoch in range(10) if keys.is_due(epoch)] == [2, 5, 8]


def test_weights_grow_from_the_first_clustering_on() -> None:
    settings = ["regions=.", "output=.", "losses.ramp=2", "losses.inter=0.5"]
    config = load_config(pretrain_slpd.Config, settings)
    config.prototypes.start_epoch = 1
    job = type("Job", (), {"config": config, "steps": 4})()
    found = [pretrain_slpd.prototype_weights(job, step) for step in (4, 8, 12, 40)]
    assert [weights["intra"] for weights in found] == [0, 0.5, 1, 1]
    assert [weights["inter"] for weights in found] == [0, 0.25, 0.5, 0.5]
    config.losses.ramp = 0
    assert pretrain_slpd.prototype_weights(job, 4) == {"intra": 1, "inter": 0.5}


def test_a_single_patient_with_enough_regions_is_too_few() -> None:
    keys = PrototypeKeys(clusters=2, min_regions=4)
    keys.check([9, 9, 1], ["p", "q", "q"])
    with pytest.raises(UserError, match="two patients .*found 1; the largest of 3 slides has 9"):
        keys.check([9, 9, 1], ["p", "p", "q"])
    with pytest.raises(UserError, match="found 0; the largest of 2 slides has 3"):
        keys.check([3, 1], ["p", "q"])
