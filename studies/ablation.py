"""Run an ablation of D2VFM on a cohort: every variant ranked, distilled, extracted, classified;
then one table.

    python -m studies.ablation --config configs/ablation/quickstart.yaml base=runs/quickstart
    output=runs/quickstart/ablation

A variant is the default with one factor changed (`combinations=one`), or any combination
(`combinations=full`). Stages are started as child processes and decide themselves what is there and
valid, so that a study that was killed goes on, and one that got a further value trains that alone.
Variants share what they have in common: the distillation set (`rank.*`), the cached features of the
trunk, its pass over the cohort. A variant that fails is listed in failures.csv, and the others go
on.
"""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key, make_assignments
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json, safe_id, write_json, write_or_remove_csv

logger = logging.getLogger(__name__)
DEFAULT = "default"
RANKING = "rank."  # keys of the ranking stage; all others are of the distillation


@dataclass
class Config:
    """Keys of an ablation."""

    base: str = key(
        "",
        "folder of a quickstart: cohort, tiles, features and detector are taken from it",
        path=True,
    )
    slides: str = key(
        "", "slide file, or folder tree of slides; empty: <base>/cohort/slides", path=True
    )
    labels: str = key("", "labels.csv of the cohort; empty: <base>/cohort/labels.csv", path=True)
    coords: str = key("", "folder of coordinates files; empty: <base>/tiles", path=True)
    features: str = key(
        "",
        "folder of feature bags; of the teacher and the references; empty: <base>/features",
        path=True,
    )
    backbone: str = key(
        "", "backbone of the detector; empty: <base>/detector/backbone.pt", path=True
    )
    output: str = key(
        REQUIRED, "where the results are written; all stages of the study", runtime=True
    )
    teacher: str = key(
        "stain_texture", "name of the teacher encoder; its bags lie in <features>/<teacher>"
    )
    references: list[str] = key(["mean_colour"], "encoders that are shown beside it")
    encoders: list[str] = key(
        [],
        "encoders, as name or name=weights; how measure_encoders is told of teacher and "
        "references; empty: by name",
    )
    default: dict[str, Any] = key(
        {}, "the default variant: keys of train_d2vfm, and rank.<key> of rank_patches"
    )
    factors: dict[str, Any] = key({}, "what is varied: {key: [value or {key: value, ...}, ...]}")
    combinations: str = key(
        "one",
        "one: one factor at a time around the default; full: every combination",
        choices=("one", "full"),
    )
    rank_config: str = key("configs/quickstart/rank.yaml", "recipe of rank_patches", path=True)
    d2vfm_config: str = key("configs/quickstart/d2vfm.yaml", "recipe of train_d2vfm", path=True)
    mil_config: str = key("configs/quickstart/mil.yaml", "recipe of the benchmark", path=True)
    rank: list[str] = key([], "further key=value of rank_patches")
    d2vfm: list[str] = key([], "further key=value of train_d2vfm")
    extract: list[str] = key([], "further key=value of the extraction")
    measure: list[str] = key([], "further key=value of measure_encoders")
    mil: list[str] = key([], "further key=value of the benchmark")


@dataclass(frozen=True)
class Variant:
    """One row of the table: its name, the factor that makes it differ from the default, and all its
    keys.
    """

    name: str
    factor: str
    settings: Mapping[str, Any]

    def of_stage(self, ranking: bool) -> dict[str, Any]:
        """Keys of the ranking, or of the distillation."""
        cut = len(RANKING) if ranking else 0
        return {
            name[cut:]: value
            for name, value in self.settings.items()
            if name.startswith(RANKING) == ranking
        }


def format_value(value: Any) -> str:
    """A value as part of a file name: [0, 1] is 0+1."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def name_settings(settings: Mapping[str, Any]) -> str:
    """Settings as part of a file name."""
    return "_".join(f"{name}-{format_value(value)}" for name, value in settings.items())


def list_students(students: Mapping[str, Path]) -> str:
    """Names and checkpoints as scripts take them."""
    return "student=[" + ",".join(f"'{name}={path}'" for name, path in students.items()) + "]"


def expand(default: Mapping[str, Any], factors: Mapping[str, Any], grid: str) -> list[Variant]:
    """The variants, the default first; values that change nothing are the default itself.

    Raises:
        UserError: a factor without values, or a value of a factor that is not in the default.
    """
    for factor, values in factors.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"factors: {factor}: expected a list of values, found {values!r}")
        if not all(isinstance(value, dict) for value in values) and factor not in default:
            raise UserError(
                f"factors: {factor}: expected its default value in default:, "
                f"{did_you_mean(factor, default)}"
            )
    # of every factor: its name, and the keys that each of its values sets
    single = [
        [(factor, value if isinstance(value, dict) else {factor: value}) for value in values]
        for factor, values in factors.items()
    ]
    one_by_one = [(choice,) for choices in single for choice in choices]
    variants = {DEFAULT: Variant(DEFAULT, DEFAULT, dict(default))}
    for combination in one_by_one if grid == "one" else itertools.product(*single):
        given = {name: value for _, parts in combination for name, value in parts.items()}
        changed = {name: value for name, value in given.items() if default.get(name) != value}
        factor = "+".join(factor for factor, parts in combination if changed.keys() & parts.keys())
        shown = {
            name.removeprefix("extra."): value
            for name, value in changed.items()
            if value is not False
        }
        name = name_settings(shown) or DEFAULT
        settings = {**default, **changed}
        variants.setdefault(safe_id(name, "variant"), Variant(name, factor or DEFAULT, settings))
    return list(variants.values())


@dataclass
class Study:
    """The folder of a study, its inputs, and what failed so far."""

    output: Path
    inputs: dict[str, str]
    failures: list[dict[str, str]]

    def stage(self, name: str, module: str, arguments: Sequence[str]) -> str:
        """Run one stage with its output in logs/<name>.log; the last line of its error, empty when
        it went well.
        """
        logger.info("== %s", name)
        log = self.output / "logs" / f"{name.replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        python = [sys.executable, "-m"]
        timed = [*python, "wsi_common.stage_timer", str(self.output / "stages.json"), name, "--"]
        with log.open("w", encoding="utf-8") as stream:
            command = [*timed, *python, module, *arguments]
            status = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
        if status == 0:
            return ""
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"exit status {status}"

    def fail(self, name: str, stage: str, error: str) -> None:
        """Remember a variant that is left out."""
        logger.error("%s: %s failed: %s", name, stage, error)
        self.failures.append({"variant": name, "stage": stage, "error": error})

    def need(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """A stage of all variants: without it there is no table."""
        if error := self.stage(name, module, arguments):
            raise UserError(f"{name}: {error} (see {self.output}/logs)")


def rank_tiles(study: Study, config: Config, variants: Sequence[Variant]) -> dict[str, Path]:
    """Variant -> its distillation set, one for all variants with the same ranking."""
    folders: dict[str, Path] = {}
    errors: dict[str, str] = {}
    for variant in variants:
        settings = variant.of_stage(ranking=True)
        name = name_settings(settings) or "ranking"
        folder = study.output / "distillation" / safe_id(name, "ranking")
        if name not in errors:
            inputs = study.inputs
            given = [f"slides={inputs['slides']}", f"labels={inputs['labels']}"]
            given += [f"features={inputs['features']}/{config.teacher}", f"output={folder}"]
            recipe = ["--config", config.rank_config, *config.rank, *make_assignments(settings)]
            errors[name] = study.stage(f"rank {name}", "mil.rank_patches", [*recipe, *given])
        if errors[name]:
            study.fail(variant.name, "rank_patches", errors[name])
        else:
            folders[variant.name] = folder
    return folders


def distil_students(
    study: Study, config: Config, variants: Sequence[Variant], sets: Mapping[str, Path]
) -> dict[str, Path]:
    """Variant -> checkpoint of its student."""
    students: dict[str, Path] = {}
    wanted = [variant for variant in variants if variant.name in sets]
    for variant in wanted:
        run = study.output / "students" / variant.name
        own = make_assignments(variant.of_stage(ranking=False))
        arguments = ["--config", config.d2vfm_config, *config.d2vfm, *own]
        arguments += [f"teacher={config.teacher}", f"cache_dir={study.output / 'cache'}"]
        arguments += ["figures=false", f"dataset={sets[variant.name]}"]
        arguments += [f"backbone={study.inputs['backbone']}", f"output={run}"]
        error = study.stage(f"train {variant.name}", "detection_kd.train_d2vfm", arguments)
        if error:
            study.fail(variant.name, "train_d2vfm", error)
        else:
            students[variant.name] = run / "checkpoint_best.pt"
    return students


def extract_students(
    study: Study, config: Config, students: dict[str, Path], on_cohort: Sequence[str]
) -> dict[str, Path]:
    """The students whose bags are all there."""
    features = study.output / "features"
    arguments = [*config.extract, *on_cohort, list_students(students), f"output={features}"]
    error = study.stage("student features", "detection_kd.extract_student", arguments)
    lists = {name: features / name / "failures.csv" for name in students}
    failed = {name: path for name, path in lists.items() if path.is_file()}
    if error and not failed:
        raise UserError(f"student features: {error} (see {study.output}/logs)")
    for name, path in failed.items():
        study.fail(name, "extract_student", f"slides failed, listed in {path}")
    return {name: path for name, path in students.items() if name not in failed}


def measure_costs(
    study: Study, config: Config, students: dict[str, Path], on_cohort: Sequence[str]
) -> Path:
    """Tiles per second, GFLOPs and parameters of all encoders from one run; measured anew when one
    is not in the file.
    """
    path = study.output / "cost.json"
    encoders = config.encoders or [config.teacher, *config.references]
    known = read_json(path, "encoder costs") if path.is_file() else {}
    arguments = [*on_cohort, f"encoders=[{','.join(encoders)}]", list_students(students)]
    arguments += [f"output={path}", *config.measure]
    arguments += ["overwrite=true"] if not set(students) <= set(known) else []
    study.need("encoder cost", "studies.measure_encoders", arguments)
    return path


def find_inputs(config: Config) -> dict[str, str]:
    """Where slides, labels, coordinates, bags and backbone are: as given, else below `base`."""
    places = {
        "slides": "cohort/slides",
        "labels": "cohort/labels.csv",
        "coords": "tiles",
        "features": "features",
        "backbone": "detector/backbone.pt",
    }
    found = {}
    for name, place in places.items():
        given = getattr(config, name)
        if not given and not config.base:
            raise UserError(
                f"missing key '{name}': expected {name}=... or base=<folder of a quickstart>, "
                "found neither"
            )
        found[name] = given or str(Path(config.base) / place)
        if not Path(found[name]).exists():
            raise UserError(
                f"{found[name]}: expected the {name} of a cohort, found nothing; run "
                "tools/quickstart.sh first"
            )
    for name in (config.teacher, *config.references):
        if not (Path(found["features"]) / name).is_dir():
            raise UserError(
                f"{found['features']}/{name}: expected feature bags, found none; extract them first"
            )
    return found


def main(config: Config) -> int:
    variants = expand(config.default, config.factors, config.combinations)
    study = Study(Path(config.output), find_inputs(config), [])
    rows = [
        {"name": variant.name, "factor": variant.factor, "settings": dict(variant.settings)}
        for variant in variants
    ]
    plan = {"teacher": config.teacher, "references": config.references, "variants": rows}
    write_json(study.output / "study.json", plan)
    students = distil_students(study, config, variants, rank_tiles(study, config, variants))
    if not students:
        raise UserError(
            f"ablation: all {len(variants)} variants failed, the first with: "
            f"{study.failures[0]['error']}"
        )
    on_cohort = [f"{name}={study.inputs[name]}" for name in ("slides", "labels", "coords")]
    students = extract_students(study, config, students, on_cohort)
    cost = measure_costs(study, config, students, on_cohort)
    folders = [f"{study.output}/features/{name}" for name in students]
    bags = study.inputs["features"]
    folders += [f"{bags}/{name}" for name in (config.teacher, *config.references)]
    sets = [f"features=[{','.join(folders)}]", f"labels={study.inputs['labels']}", f"cost={cost}"]
    recipe = ["--config", config.mil_config, *config.mil]
    study.need("mil benchmark", "mil.benchmark", [*recipe, *sets, f"output={study.output / 'mil'}"])
    header = ["variant", "stage", "error"]
    write_or_remove_csv(study.output / "failures.csv", header, study.failures)
    study.need("table", "studies.ablation_table", [f"study={study.output}"])
    counts, page = (len(variants), len(study.failures)), study.output / "ablation.html"
    logger.info("ablation: %d variants, %d failed: %s", *counts, page)
    return 1 if study.failures else 0


if __name__ == "__main__":
    launch(main, Config)
