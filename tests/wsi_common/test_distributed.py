"""What processes share out."""

from __future__ import annotations

import pytest

from wsi_common.distributed import share_batch
from wsi_common.errors import UserError


def test_batches_are_shared_out_evenly_or_refused() -> None:
    assert share_batch(12, 2) == 6 and share_batch(12, 2, accumulate=3) == 2
    with pytest.raises(UserError, match="batch_size=5: expected a multiple of the 2 processes$"):
        share_batch(5, 2)
    with pytest.raises(UserError, match="of the 2 processes times accumulate=4$"):
        share_batch(12, 2, accumulate=4)
