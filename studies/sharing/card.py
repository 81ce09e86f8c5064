"""Writes the model card (README.md) of a trained model, with the front matter that hubs read.

Format: https://huggingface.co/docs/hub/model-cards. Sections follow Mitchell et al., Model Cards
for Model Reporting, FAT* 2019: what it is, data, metrics with intervals, limits, licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from studies.sharing.folder import TrainedModel
from studies.sharing.metrics import Metric
from studies.sharing.terms import LINKS, TERMS, Origin, find_licence
from wsi_common import __version__
from wsi_common.shared_weights import WEIGHTS

CITATIONS = "Name the encoders above as their cards ask."
LIMITS = (
    "For research. It is no medical device and was not made to decide about patients.",
    "Figures are of the data above. Other scanners, stains, laboratories and patients change them: "
    "measure it on your own slides before you rely on it.",
    "It gives a number for any picture, also for one that shows something else than what it was "
    "trained on.",
)


@dataclass(frozen=True)
class CardText:
    """What only the author knows.

    Attributes:
        title: of the model.
        data: about the cohort: where it is from, who may use it.
        limits: known limits, beside the general ones.
        licence: under which the model is shared; empty: it may not be shared.
        refusal: why not.
    """

    title: str
    data: str = ""
    limits: tuple[str, ...] = ()
    licence: str = ""
    refusal: str = ""


def write_card(
    model: TrainedModel,
    origins: Sequence[Origin],
    stated: Mapping[str, str],
    metrics: Sequence[Metric],
    counts: Mapping[str, str],
    text: CardText,
) -> str:
    """The whole card.

    Args:
        model: the run.
        origins: the encoders behind it.
        stated: licences of encoders that the table does not have.
        metrics: its figures.
        counts: what it was trained on, in numbers.
        text: the author's words.
    """
    header = yaml.safe_dump(make_front_matter(model, origins, metrics, text), sort_keys=False)
    parameters = sum(tensor.numel() for tensor in model.content["model"].values())
    intro = f"A {model.kind.title} for whole-slide images, {parameters:,} weights in `{WEIGHTS}`."
    sections = {
        "Load it": _show_loading(model),
        "Data": _list_facts({"cohort": text.data or "not described by its author", **counts}),
        "Metrics": _tabulate(metrics),
        "Limits": "\n".join(f"- {line}" for line in (*text.limits, *LIMITS)),
        "Licence": _explain_licence(origins, stated, text),
    }
    body = "\n\n".join(f"## {name}\n\n{content}" for name, content in sections.items())
    return f"---\n{header}---\n\n# {text.title}\n\n{intro}\n\n{body}\n"


def make_front_matter(
    model: TrainedModel, origins: Sequence[Origin], metrics: Sequence[Metric], text: CardText
) -> dict[str, Any]:
    """The YAML that a hub shows and searches."""
    known = text.licence and text.licence not in LINKS
    licence = {"license": text.licence if known else "other"}
    if not known:
        licence["license_name"] = text.licence or "not-to-be-shared"
    if text.licence in LINKS:
        licence["license_link"] = LINKS[text.licence]
    encoders = [origin.encoder.replace(":", "-").replace("/", "-") for origin in origins]
    names = [*model.kind.tags, *sorted(set(filter(None, encoders)))]
    entry = {"name": text.title, "results": _index(model, metrics)}
    return {
        **licence,
        "pipeline_tag": model.kind.task,
        "tags": ["pathology", "whole-slide-images", *names],
        "model-index": [entry],
    }


def _index(model: TrainedModel, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Figures as the hub's `model-index` wants them: by data."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for metric in metrics:
        shown = {"type": metric.name, "name": metric.name, "value": round(metric.value, 6)}
        if metric.interval:
            shown["args"] = {"ci95": [round(end, 6) for end in metric.interval]}
        parts.setdefault(metric.data, []).append(shown)
    return [
        {
            "task": {"type": model.kind.task},
            "dataset": {"type": "private", "name": data},
            "metrics": m,
        }
        for data, m in parts.items()
    ]


def _show_loading(model: TrainedModel) -> str:
    lines = "\n".join(model.kind.load)
    language = "python" if lines.startswith("from") else "bash"
    return (
        f"Fetch it with `bash tools/pull_model.sh repo=<this repository> output=<folder>`, which "
        f"compares digests and runs no code of the folder. Then, with version {__version__} or "
        f"later:\n\n```{language}\n{lines}\n```\n\nThe folder takes the place of a "
        "`checkpoint_best.pt` in every command that reads one."
    )


def _list_facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _tabulate(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return "None are recorded."
    rows = ["| measured on | metric | value | 95 % interval |", "|---|---|---|---|"]
    for metric in metrics:
        ends = metric.interval
        shown = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "-"
        rows.append(f"| {metric.data} | {metric.name} | {metric.value:.4g} | {shown} |")
    return "\n".join(rows)


def _explain_licence(origins: Sequence[Origin], stated: Mapping[str, str], text: CardText) -> str:
    chosen = f"The model is shared under **{text.licence}**."
    lines = [chosen if text.licence else f"**The model may not be shared:** {text.refusal}."]
    for origin in origins:
        licence = find_licence(origin.encoder, stated) or "unknown"
        terms = TERMS.get(licence.lower())
        clause = f", which {terms.clause}" if terms else ""
        name = origin.encoder or "not named"
        lines.append(f"- {origin.role} ({origin.way}): `{name}`, {licence}{clause}")
    return "\n".join(
        [lines[0], "", *(lines[1:] or ["- It comes from no other network."]), "", CITATIONS]
    )
