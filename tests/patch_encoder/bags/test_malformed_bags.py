"""Bags that are damaged, of another layout, or that would have other files read: each is one line,
and none of them stops a cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.cohort.summary import bag_size
from patch_encoder.tiles.coordinates import coordinate_attributes, read_coordinates
from patch_encoder.tiles.formats import describe_content, detect_layout
from wsi_common.errors import DamagedFile, UserError

ROWS, CORNERS = np.ones((3, 4), np.float32), np.zeros((3, 2), np.int64)


def group(file: h5py.File) -> None:
    file.create_group("features")


def group_of_coords(file: h5py.File) -> None:
    file["features"] = ROWS
    file.create_group("coords")


def strings(file: h5py.File) -> None:
    file.create_dataset("features", data=[["a", "b"]] * 3, dtype=h5py.string_dtype())


def references(file: h5py.File) -> None:
    file["features"] = np.full((3, 4), file.ref, h5py.ref_dtype)


def compound(file: h5py.File) -> None:
    file["features"] = np.zeros((3, 4), [("a", "f4"), ("b", "f4")])


def no_space(file: h5py.File) -> None:
    file["features"] = h5py.Empty("f4")


def scalar(file: h5py.File) -> None:
    file["features"] = 1.0


def cycle(file: h5py.File) -> None:
    file["features"] = h5py.SoftLink("/coords")
    file["coords"] = h5py.SoftLink("/features")


def dangling(file: h5py.File) -> None:
    file["features"] = h5py.SoftLink("/nowhere")


def external_link(file: h5py.File) -> None:
    file["features"] = h5py.ExternalLink("secret.h5", "features")


def external_coords(file: h5py.File) -> None:
    file["features"] = ROWS
    file["coords"] = h5py.ExternalLink("secret.h5", "coords")


def external_storage(file: h5py.File) -> None:
    secret = str(Path(file.filename).with_name("secret.bin"))
    file.create_dataset("features", (3, 4), "f4", external=[(secret, 0, 48)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "features", (3, 4))
    file.create_virtual_dataset("features", layout)


MALFORMED: tuple[Callable[[h5py.File], None], ...] = (
    group, group_of_coords, strings, references, compound, no_space, scalar, cycle, dangling,
    external_link, external_coords, external_storage, virtual,
)  # fmt: skip


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder with files that a bag has no business to read."""
    write_bag(tmp_path / "secret.h5", ROWS, CORNERS, {"patch_size": 64})
    (tmp_path / "secret.bin").write_bytes(ROWS.tobytes())
    return tmp_path


@pytest.mark.parametrize("write", MALFORMED, ids=lambda write: write.__name__)
def test_malformed_bags_are_one_line(secrets: Path, write: Callable[[h5py.File], None]) -> None:
    path = secrets / "a.h5"
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(DamagedFile, match="a.h5") as caught:
        read_bag(path)
    assert "\n" not in str(caught.value)
    assert write.__name__ == "group_of_coords" or write is external_coords or bag_size(path) is None


@pytest.mark.parametrize("write", [group_of_coords, external_coords, cycle])
def test_malformed_coordinates_are_one_line(
    secrets: Path, write: Callable[[h5py.File], None]
) -> None:
    path = secrets / "a.h5"
    with h5py.File(path, "w") as file:
        write(file)
    with pytest.raises(DamagedFile, match="a.h5"):
        read_coordinates(path)
    assert coordinate_attributes(path) == {}
    assert describe_content(path) == {"readable": False}
    with pytest.raises(UserError, match="a.h5"):
        detect_layout(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_bag(tmp_path / "absent.h5")
    assert not isinstance(caught.value, DamagedFile), "nothing is there that could be replaced"


@pytest.mark.parametrize(
    "content", [torch.ones(3, 4, dtype=torch.complex64), {"features": ROWS.tolist()}, {"coords": 1}]
)
def test_malformed_tensor_files_are_one_line(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt"):
        read_bag(tmp_path / "a.pt")
    torch.save({"features": torch.ones(3, 4), "coords": "north"}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="b.pt"):
        read_bag(tmp_path / "b.pt")


def test_published_regions_are_told_from_tiles(tmp_path: Path) -> None:
    """SLPD's code stores (R, D, G, G) features under the names of a bag."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 4, 3, 3), np.float32), CORNERS[:2]
    with pytest.raises(DamagedFile, match="build_regions makes regions of them"):
        read_bag(tmp_path / "a.h5")
