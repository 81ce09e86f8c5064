"""Every YAML in configs/: its header says what it is and how to run it, and that command builds the
model.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import ROOT
from wsi_common.config import load_config
from wsi_common.errors import UserError

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def header(path: Path) -> tuple[list[str], list[str]]:
    """(comment lines before the first key, words of the command after `run:`)."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    commands = [line.split("run:", 1)[1] for line in lines if "run:" in line]
    assert len(commands) == 1, f"{path}: expected one '# run:' line in the header"
    return lines, shlex.split(commands[0])


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The module that a header's command runs, directly or through a script of tools/, and its
    arguments.
    """
    words = [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=.*", word)]
    if words[0] == "bash":
        script = (ROOT / words[1]).read_text()
        found = re.search(r"^run_(?:module|python|shards) ([\w.]+)", script, re.MULTILINE)
        assert found, words[1]
        return found[1], words[2:]
    index = len(words) - 1 - words[::-1].index("-m")
    return words[index + 1], words[index + 2 :]


def test_there_are_configs_of_both_kinds() -> None:
    assert len([path for path in CONFIGS if path.parent.name == "quickstart"]) >= 8
    assert len([path for path in CONFIGS if path.parent.name == "ts2gkd"]) >= 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_header_command_builds_the_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, words = header(path)
    assert len(lines) >= 3, f"{path}: expected what it is, what it needs and the command"
    module_name, arguments = module_and_arguments(words)
    assert str(path.relative_to(ROOT)) in arguments, f"{path}: the command names another file"
    monkeypatch.chdir(ROOT)
    script = importlib.import_module(module_name)
    # what stands in a script's own defaults (output, labels) is not in the header; paths are the
    # user's
    missing = {name: "x" for name in required(script.Config)} | dict(
        a.split("=", 1) for a in arguments if "=" in a
    )
    config = load_config(
        script.Config,
        [*arguments[:2], *(f"{k}={v}" for k, v in missing.items())],
        check_paths=False,
    )
    for name in yaml.safe_load(path.read_text()) or {}:
        assert re.search(
            rf"^\s*{name}:.*#|^{name}:\s*$|#.*\n{name}:", path.read_text(), re.MULTILINE
        ), f"{path}: '{name}' has no comment"
    build(script, config)


def required(config_class: type) -> list[str]:
    from wsi_common.config import REQUIRED, _fields

    return [name for name, _, field in _fields(config_class) if field.default == REQUIRED]


def build(script: object, config: object) -> None:
    """`build_model` on the meta device, where the script has one; weights of the user's are not
    there.
    """
    build_model = getattr(script, "build_model", None)
    if build_model is None:
        return
    module = script.__name__  # type: ignore[attr-defined]
    if module == "patch_encoder.extract_features":
        from patch_encoder.models.encoders import build_encoder

        # open_clip moves its model to a device while it builds it, which storage-less tensors do
        # not stand
        with torch.device("cpu" if config.encoder == "clip" else "meta"):  # type: ignore[attr-defined]
            encoder = build_encoder(config.encoder, "random")  # type: ignore[attr-defined]
        assert encoder.dim > 0
        return
    try:
        # these read weights of an earlier run where there are any, which storage-less tensors
        # cannot take
        reads = {"detection_kd.train_d2vfm", "detection_kd.extract_student"}
        with torch.device("cpu" if module in reads else "meta"):
            model = (
                build_model(config, 512)
                if module == "detection_kd.train_d2vfm"
                else build_model(config)
            )
        assert model is not None
    except UserError as error:
        # only what the user brings may be missing
        assert re.search(r"found no file|found none", str(error)), error
