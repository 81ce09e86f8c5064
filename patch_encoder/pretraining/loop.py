"""What the loops of the pre-training scripts share besides the gradients of a step: seeds, when a
checkpoint is due, what is reported of an epoch, and how a run is taken up again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from patch_encoder.pretraining.state import DistillationState
from wsi_common.distributed import World, mean_number
from wsi_common.progress import describe_values
from wsi_common.run import Run
from wsi_common.seed import seed_everything

logger = logging.getLogger(__name__)
AGREE_EVERY = 10  # steps between two questions whether a checkpoint is due, of several processes


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the draws of stochastic depth, which then do not depend on earlier steps."""
    seed_everything((seed * 1_000_003 + step) * 1_009 + rank)


def is_checkpoint_due(
    world: World, step: int, saved: float, minutes: float, told: bool = False
) -> bool:
    """Whether so many minutes have gone by for the main process, or any process was told to end;
    all processes get the same answer.

    Args:
        world: this process.
        step: that is completed.
        saved: when the last checkpoint was written (time.monotonic).
        minutes: between two checkpoints.
        told: this process to end, by SIGTERM.
    """
    if world.size > 1 and step % AGREE_EVERY:
        return False
    due = time.monotonic() - saved >= 60 * minutes
    return mean_number(float((due and world.is_main) or told), world.device) > 0


def report_epoch(
    run: Run, epoch: int, epochs: int, line: Mapping[str, float], names: Sequence[str]
) -> None:
    """Write the line of a completed epoch to metrics.jsonl, and those values of it that are named
    to the log.
    """
    run.log({"epoch": epoch, **line})
    logger.info("epoch %d/%d: %s", epoch, epochs, describe_values(line, names, digits=3))


def take_up(run: Run, state: DistillationState, stage: str) -> Mapping[str, Any]:
    """Put the state back to where the last checkpoint left it, and drop logged lines of what will
    be done again.

    Args:
        run: the run directory.
        state: as a fresh run has it.
        stage: the script's name, for the log.

    Returns:
        The checkpoint's content, whose `epoch` is that of completed epochs; empty where the run
        begins.
    """
    content = state.resume(run.last)
    run.forget_after(content.get("epoch", 0), state.step)
    if content:
        logger.info("%s: goes on after step %d", stage, state.step)
    return content
