"""What AT+ costs: its attention maps, and a student at low resolution, enlarged or as it is.

    python -m benchmarks.resolution [--parts strides maps student] [--side 128] [--batch 16]
        [--rounds 5] [--threads 1] [--json]

- `strides`: operations of students that see their small image, with 0 to log2(ratio) strides taken
  out of the trunk, against their teacher's; counted, nothing is timed.
- `maps`: the maps of 4 grades from 512 channels and their gradients with respect to activations and
  weights. The original differentiates twice, grade by grade; ours is a closed form of two 1x1
  convolutions, after a ReLU of one.
- `student`: VGG16 on `--batch` images of `--side` px, at ratios 4 and 8: its operations, a forward
  pass in evaluation, a training step and the bytes that a step keeps for the backward pass. The
  student of the original is enlarged to its teacher's size; a native one sees its small image. A
  step is the teacher's forward pass and the student's forward, backward and Adam step, with the
  loss CE + 0.1 FM + 10 AT+ (as published). `original` differentiates maps twice, and its teacher
  keeps a graph.

In a round all take turns. Times are CPU time of this process, so that others on the machine count
less. Figures are medians over rounds; a ratio is the median of the rounds' ratios to the first one.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import Call, Figures, format_table, make_parser, measure_ratios, say
from detection_kd.grading.network_cost import count_kept_bytes, count_trunk
from detection_kd.losses.attention_transfer import (
    attention_loss,
    find_attention,
    find_attention_by_autograd,
)
from detection_kd.losses.resolution_losses import (
    PairedOutputs,
    ResolutionTerms,
    feature_matching_loss,
    resolution_loss,
)
from detection_kd.models.grading_trunks import build_trunk
from detection_kd.models.low_resolution import GradingKeys, GradingNetwork, PatchScale

GRADES = ("NC", "G3", "G4", "G5")
SHAPES = {"16 maps of 8 x 8": (16, 512, 8, 8), "4 maps of 32 x 32": (4, 512, 32, 32)}
RATIOS = (4, 8)
TRUNKS, FULL = ("vgg16", "tf_efficientnet_lite0"), 512
DOUBLE, CLOSED = "double backward", "closed form"
ORIGINAL, ENLARGED, NATIVE = "original", "enlarged", "native"


def clock_cpu(call: Call) -> float:
    """Milliseconds of CPU time of one call."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measure(
    calls: dict[str, Call], baseline: str, rounds: int, name: str
) -> dict[str, dict[str, float]]:
    """Milliseconds of each call, and how many times as fast as the baseline it is."""
    clocks = {who: lambda call=call: clock_cpu(call) for who, call in calls.items()}
    found = measure_ratios(clocks, baseline, rounds)
    return {who: {f"{name} ms": ms, f"{name} ratio": ratio} for who, (ms, ratio) in found.items()}


def run_maps(rounds: int) -> Figures:
    """Figures of attention maps with their gradients."""
    figures = {}
    for title, shape in SHAPES.items():
        say(f"maps: {title}")
        generator = torch.Generator().manual_seed(0)
        draw = (torch.randn(size, generator=generator) for size in (shape, (4, shape[1])))
        activations, weight = (tensor.requires_grad_() for tensor in draw)
        ahead = torch.randn(shape[0], 4, *shape[2:], generator=generator)

        def differentiate_twice(a: Tensor, w: Tensor) -> Tensor:
            return find_attention_by_autograd(a, F.linear(a.mean(dim=(2, 3)), w), create_graph=True)

        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            DOUBLE: differentiate_twice,
            CLOSED: find_attention,
            f"{CLOSED}, after a ReLU": lambda a, w: find_attention(a, w, rectified=True),
        }
        inputs = (activations, weight)
        calls: dict[str, Call] = {
            name: lambda find=find, inputs=inputs, ahead=ahead: torch.autograd.grad(
                find(*inputs), inputs, ahead
            )
            for name, find in ways.items()
        }
        figures[title] = measure(calls, DOUBLE, rounds, "map")
    return figures


@dataclass
class Step:
    """A training step of one contestant.

    Attributes:
        images: at full resolution (B, 3, side, side), 0..1.
        labels: grades (B,).
        published: maps are differentiated twice and the teacher keeps a graph.
    """

    student: GradingNetwork
    teacher: GradingNetwork
    images: Tensor
    labels: Tensor
    published: bool

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=1e-4)
        self.terms = ResolutionTerms(fm=0.1, at_plus=10.0)
        self.reduced = F.avg_pool2d(self.images, self.student.scale.ratio)
        self.teacher.requires_grad_(self.published)

    def find_loss(self) -> Tensor:
        """The loss, by the teacher's and the student's forward pass."""
        student, teacher = self.student(self.reduced), self.teacher(self.images)
        if not self.published:
            pair = PairedOutputs(student, teacher, self.student.head, self.teacher.head, self.terms)
            return resolution_loss(student.logits, self.labels, self.terms.weights(), pair)[0]
        maps = [
            find_attention_by_autograd(output.maps, output.logits, create_graph=True)
            for output in (student, teacher)
        ]
        matching = feature_matching_loss(student.maps, teacher.maps)
        return (
            F.cross_entropy(student.logits, self.labels)
            + 0.1 * matching
            + 10 * attention_loss(*maps)
        )

    def run(self) -> None:
        """One step."""
        loss = self.find_loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def count_kept_bytes(self) -> int:
        """Bytes of activations that one step keeps for its backward pass."""
        parameters = [*self.student.parameters(), *self.teacher.parameters()]
        return count_kept_bytes(parameters, self.find_loss)


def run_strides() -> Figures:
    """Operations of native students with strides taken out of their trunks."""
    figures = {}
    for name in TRUNKS:
        whole = count_trunk(build_trunk(name, "random"), FULL)
        rows = {"teacher": {"GFLOP/image": whole[0], "map": whole[1], "times less": 1.0}}
        for ratio in RATIOS:
            for removed in range(ratio.bit_length()):
                flops, cells = count_trunk(build_trunk(name, "random", removed), FULL // ratio)
                row = {"GFLOP/image": flops, "map": cells, "times less": whole[0] / flops}
                rows[f"ratio {ratio}, {removed} removed"] = row
        figures[f"{name}, {FULL} px"] = rows
    return figures


def make_steps(ratio: int, side: int, batch: int) -> dict[str, Step]:
    """The contestants, from the same weights and images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, side, side, generator=generator)
    labels = torch.arange(batch) % len(GRADES)
    steps = {}
    for who in (ORIGINAL, ENLARGED, NATIVE):
        networks = []
        for scale in (PatchScale(side, ratio), PatchScale(side)):
            torch.manual_seed(0)
            keys = GradingKeys("vgg16", "random", enlarged=who != NATIVE, normalised=False)
            networks.append(GradingNetwork(keys, GRADES, scale))
        steps[who] = Step(*networks, images, labels, published=who == ORIGINAL)
    return steps


def run_students(side: int, batch: int, rounds: int) -> Figures:
    """Figures of students at each ratio."""
    figures = {}
    for ratio in RATIOS:
        title = f"VGG16, {side} px, ratio {ratio}, {batch} images"
        say(f"student: {title}")
        steps = make_steps(ratio, side, batch)
        rows: dict[str, dict[str, float]] = {}
        for who, step in steps.items():
            seen = side // ratio if who == NATIVE else side
            rows[who] = {
                "GFLOP/image": count_trunk(step.student.trunk, seen)[0],
                "kept MiB": step.count_kept_bytes() / 2**20,
            }

        def predict(step: Step) -> None:
            with torch.inference_mode():
                step.student(step.reduced)

        forwards: dict[str, Call] = {
            who: lambda step=steps[who]: predict(step) for who in (ENLARGED, NATIVE)
        }
        for who, row in measure(forwards, ENLARGED, rounds, "forward").items():
            rows[who] |= row | {"images/s": 1e3 * batch / row["forward ms"]}
        calls: dict[str, Call] = {who: step.run for who, step in steps.items()}
        for who, row in measure(calls, ENLARGED, rounds, "step").items():
            rows[who] |= row
        figures[title] = rows
    return figures


PARTS: dict[str, Callable[[Namespace], Figures]] = {
    "strides": lambda a: run_strides(),
    "maps": lambda a: run_maps(a.rounds),
    "student": lambda a: run_students(a.side, a.batch, a.rounds),
}


def main() -> None:
    parser = make_parser(__doc__, side=128, batch=16, rounds=5, threads=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    figures = {part: PARTS[part](a) for part in a.parts}
    if a.json:
        print(json.dumps({"figures": figures} | vars(a)))
        return
    print(f"{a.threads} threads, {a.rounds} rounds; torch {torch.__version__}")
    print(format_table(figures))


if __name__ == "__main__":
    main()
