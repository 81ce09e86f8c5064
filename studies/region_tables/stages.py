"""Runs scripts of the packages below in this process.

A study calls some scripts a hundred times; in child processes the start of Python and torch would
take longer than the smallest trainings. This is the one place where scripts are imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from detection_kd import evaluate_detector, filter_samples, train_detector, train_mitosis
from mil import benchmark
from patch_encoder import build_regions, pretrain_slpd
from patch_encoder.demo import compose_mitoses
from wsi_common.config import load_config

SCRIPTS: dict[str, ModuleType] = {
    "build_regions": build_regions,
    "pretrain_slpd": pretrain_slpd,
    "benchmark": benchmark,
    "compose_mitoses": compose_mitoses,
    "train_mitosis": train_mitosis,
    "filter_samples": filter_samples,
    "train_detector": train_detector,
    "evaluate_detector": evaluate_detector,
}


def load_settings(name: str, arguments: Sequence[str]) -> Any:
    """The keys of a script as its command line would set them.

    Raises:
        UserError: a key or value that the script does not take.
    """
    return load_config(SCRIPTS[name].Config, list(arguments))


def run_script(name: str, arguments: Sequence[str]) -> int:
    """Run a script as its command line would; its exit status.

    Raises:
        UserError: what the script raises.
    """
    return SCRIPTS[name].main(load_settings(name, arguments)) or 0
