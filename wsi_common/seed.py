"""Seeds for python, numpy, torch and workers, and the state needed to go on exactly where a run
stopped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wsi_common.errors import UserError


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse a list of training seeds from which no spread over seeds can be told.

    Raises:
        UserError: none, or one that is there twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: expected different whole numbers, found {list(seeds)}")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_worker(_: int) -> None:
    """`worker_init_fn`: numpy and python follow the seed that torch gave this worker."""
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator for one epoch's shuffling and worker seeds, so that an epoch can be repeated on
    its own.
    """
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def rng_state() -> dict[str, Any]:
    """States of all generators as plain containers and tensors, loadable with
    `weights_only=True`.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`; CUDA states are set as far as this machine has the devices."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
