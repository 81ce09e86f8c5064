"""What pre-training costs: reading tiles, making views, a step, memory, each against a baseline.

    python -m benchmarks.pretraining [--parts data views step memory] [--svs slide.svs]
        [--tiles 32] [--rounds 7] [--threads 1] [--json]

Each part measures its contestants in turns, in one run, and says in its own file what they are:
`data` in benchmarks/pretraining_data.py (with `--svs` on that slide, too), `views` in
benchmarks/pretraining_views.py, `step` and `memory` in benchmarks/pretraining_step.py. A ratio says
how many times as fast as the first line a contestant is, of memory how many times as large.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.pretraining_data import run_data
from benchmarks.pretraining_step import run_memory, run_steps
from benchmarks.pretraining_views import run_views
from benchmarks.rounds import Figures, format_table, make_parser
from wsi_common.device import pick_device

PARTS: dict[str, Callable[[Namespace], Figures]] = {
    "data": lambda a: run_data(a.svs, a.slides, a.side, a.batches, a.rounds, a.workers),
    "views": lambda a: run_views(a.tiles, a.rounds, pick_device(a.device), a.gpu_tiles),
    "step": lambda a: run_steps(a.tiles, a.rounds),
    "memory": lambda a: run_memory(),
}


def main() -> None:
    parser = make_parser(__doc__, tiles=32, rounds=7, threads=1, gpu_tiles=64)
    for name, default, text in (
        ("slides", 48, "slides of the data part"),
        ("side", 8192, "their side, px"),
        ("batches", 4, "of 128 tiles in a round"),
        ("workers", 2, "reading processes"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--svs", type=Path, help="a slide with JPEG tiles, as CMU-1-Small-Region")
    parser.add_argument("--device", default="auto", help="of the views")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    figures = {part: PARTS[part](a) for part in a.parts}
    if a.json:
        print(json.dumps({"figures": figures} | vars(a), default=str))
        return
    print(f"{a.tiles} tiles, {a.threads} threads, {a.rounds} rounds; torch {torch.__version__}")
    print(format_table(figures))


if __name__ == "__main__":
    main()
