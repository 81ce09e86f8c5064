"""What becomes of a slide that crashes or hangs the processes that read it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from wsi_common.errors import UserError
from wsi_common.processes.pool import Lost

logger = logging.getLogger(__name__)
UNEXPLAINED = 3  # deaths outside any slide, one after the other, that end the run


class CrashPolicy:
    """Decides when to stop retrying a slide: after two decoding workers have crashed on it.

    Args:
        slides: their names.
        place: the two numbers of a worker's last heartbeat, slide and tile -> where that is.

    Attributes:
        given_up: slide index -> reason.
    """

    def __init__(self, slides: Sequence[str], place: Callable[[int, int], str]) -> None:
        self.given_up: dict[int, str] = {}
        self._slides, self._place = slides, place
        self._struck: dict[int, float] = {}  # slide index -> when a process was lost over it
        self._unexplained = 0

    def record_batch(self) -> None:
        """A batch has come, so that workers do not die one after the other."""
        self._unexplained = 0

    def record_crash(self, lost: Lost) -> None:
        """A worker crashed or hung.

        Raises:
            UserError: that happens again and again outside any slide.
        """
        if not lost.reason:  # the batch only waited for that process
            return
        if lost.at is None:
            self._unexplained += 1
            logger.warning("%s, at no slide; its batch is read again", lost.reason)
            if self._unexplained == UNEXPLAINED:
                raise UserError(
                    f"{self._unexplained} decoding processes were lost one after the other, the "
                    f"last: {lost.reason}; what is finished is kept: lower workers= or batch_size= "
                    "and start again"
                )
            return
        slide, tile = lost.at
        reason = f"{lost.reason} at {self._place(slide, tile)}"
        if slide not in self._struck:
            logger.warning("slide %s: %s; it is tried once more", self._slides[slide], reason)
            self._struck[slide] = time.monotonic()
        elif (
            lost.since > self._struck[slide]
        ):  # else a neighbour at the same slide, lost together with the first
            self.given_up[slide] = f"{reason}, and so did another before it; the slide is given up"
