"""Typed configuration: dataclass defaults < YAML file < `key=value` on the command line, merged
strictly.

The merge is OmegaConf's structured configs; this module adds what a person at a terminal needs:
one-line errors that give expected, found and the nearest valid name, `--help` from the same
dataclass, and checks of choices and paths before any work starts. Config objects stop at the entry
point: code below takes plain arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsi_common.errors import UserError, did_you_mean
from wsi_common.yaml_text import TEXT, read_yaml, read_yaml_value

T = TypeVar("T")


class ConfigError(UserError):
    """A configuration that cannot be used; entry points print it and exit with status 2."""


class HelpRequested(Exception):
    """`--help` was given; the message is the text to print."""


def key(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    path: bool = False,
    runtime: bool = False,
    alias: str = "",
    least: float | None = None,
) -> Any:
    """A configuration field.

    Args:
        default: default value, or `REQUIRED` when the user has to give one.
        help: one line for `--help`, with the unit.
        choices: valid strings, checked when the configuration is loaded.
        path: names an input file or folder that has to exist (an empty string or None means "not
            used").
        runtime: changes where or how fast the work is done but not its result (device, workers,
            overwrite): not part of a run's identity.
        alias: a second name, by which a published system calls the key.
        least: smallest number that is valid, checked when the configuration is loaded.
    """
    metadata = {
        "help": help + (f" (also {alias}=)" if alias else ""),
        "choices": choices,
        "path": path,
        "runtime": runtime,
        "alias": alias,
        "least": least,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED: Any = MISSING


def group(config_class: type[T], help: str) -> T:
    """A nested block of keys, written `block.key=value`."""
    return dataclasses.field(default_factory=config_class, metadata={"help": help})


def load_config(config_class: type[T], arguments: Sequence[str], *, check_paths: bool = True) -> T:
    """Merge defaults, `--config FILE` and `key=value` arguments into one typed object.

    Raises:
        ConfigError: unknown key, wrong type, missing required key, unknown choice, path that does
            not exist.
        HelpRequested: `--help` or `-h` is among the arguments.
    """
    config = OmegaConf.structured(config_class)
    file, assignments = _split_arguments(config_class, arguments)
    given = _merge_file(config, config_class, file) if file is not None else []
    for name, value in assignments:
        _assign(config, config_class, name, value, source="command line")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"missing key '{missing[0]}': expected a value, found none; add {missing[0]}=... (see "
            "--help)"
        )
    result = OmegaConf.to_object(config)
    for name, field, value in walk(result):
        _check_value(name, field, value, check_paths)
    names = _aliases(config_class)
    result._given = frozenset(
        names.get(name, name) for name in [*given, *(name for name, _ in assignments)]
    )
    return result  # type: ignore[return-value]


def given_keys(config: Any) -> frozenset[str]:
    """Keys that a file or the command line gave; of a configuration made in code, those that differ
    from the default.
    """
    if hasattr(config, "_given"):
        return config._given
    default = {name: field for name, _, field in _fields(type(config))}
    return frozenset(name for name, _, value in walk(config) if value != _default(default[name]))


def _default(field: dataclasses.Field[Any]) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _split_arguments(
    config_class: type, arguments: Sequence[str]
) -> tuple[Path | None, list[tuple[str, str]]]:
    file: Path | None = None
    assignments: list[tuple[str, str]] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument in {"-h", "--help"}:
            raise HelpRequested(describe(config_class))
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or (queue.pop(0) if queue else "")
            if not value:
                raise ConfigError(
                    "--config: expected the path of a YAML file, found nothing after it"
                )
            if file is not None:
                raise ConfigError(
                    f"--config: expected one file, found {file} and {value}; give the keys of one "
                    "as key=value"
                )
            file = Path(value)
        elif "=" in argument and not argument.startswith("-"):
            name, _, value = argument.partition("=")
            assignments.append((name, value))
        else:
            raise ConfigError(f"argument '{argument}': expected --config FILE, --help or key=value")
    return file, assignments


def _merge_file(config: DictConfig, config_class: type, file: Path) -> list[str]:
    """Merge a YAML file; returns the dotted names that it sets."""
    if not file.is_file():
        raise ConfigError(
            f"--config {file}: expected a YAML file, found none; {nearest_path(file)}"
        )
    leaves, names = dict(_leaves(config_class)), _aliases(config_class)
    given: list[str] = []
    try:
        for name, value in read_yaml(file.read_text(encoding="utf-8"), leaves | names):
            name = names.get(name, name)
            if name in given:
                raise ConfigError(f"{file}: key '{name}': expected once, found twice; remove one")
            given.append(name)
            _assign(config, config_class, name, value, source=str(file))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected YAML, found {' '.join(str(error).split())}") from None
    return given


def _assign(config: DictConfig, config_class: type, name: str, value: Any, source: str) -> None:
    leaves = dict(_leaves(config_class))
    name = _aliases(config_class).get(name, name)
    if name not in leaves:
        raise ConfigError(f"{source}: unknown key '{name}'; {did_you_mean(name, leaves)}")
    expected = leaves[name]
    try:
        # text stays text (an id of 0012 keeps its zeros); everything else is read as YAML
        if isinstance(value, str) and expected not in TEXT:
            value = read_yaml_value(value, expected)
        if get_origin(expected) is list and isinstance(value, (str, int, float)):
            value = [value]  # student=a.pt is student=[a.pt]
        if value == "null" and expected is not str:
            value = None
        # YAML 1.1 reads 1e-4 (no dot) as text
        if isinstance(value, str) and expected is float:
            value = float(value)
        if "${" in str(value):
            raise ConfigError(
                f"{source}: key '{name}': expected the value itself, found the variable '{value}'; "
                "variables are not replaced here"
            )
        OmegaConf.update(config, name, value, merge=False)
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"{source}: key '{name}': expected {_type_name(expected)}, found {value!r}"
        ) from None


def _leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", hint


def _aliases(config_class: type) -> dict[str, str]:
    """Second names of keys -> their names; a block's keys have none."""
    fields = dataclasses.fields(config_class)
    return {f.metadata["alias"]: f.name for f in fields if f.metadata.get("alias")}


def _type_name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not hasattr(hint, "__args__")
        else str(hint).replace("typing.", "")
    )


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted name, field, value) of every key of a configuration object, nested blocks
    included.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def _check_value(name: str, field: dataclasses.Field[Any], value: Any, check_paths: bool) -> None:
    choices = field.metadata.get("choices")
    items = value if isinstance(value, list) else [value]
    numbers = value.values() if isinstance(value, dict) else items
    if any(isinstance(number, float) and math.isnan(number) for number in numbers):
        raise ConfigError(f"key '{name}': expected a number, found nan")
    least = field.metadata.get("least")
    for item in items:
        if least is not None and item is not None and item < least:
            raise ConfigError(f"key '{name}': expected at least {least}, found {item}")
        if choices and item not in choices:
            raise ConfigError(
                f"key '{name}': expected one of {', '.join(choices)}, found '{item}'; "
                f"{did_you_mean(str(item), choices)}"
            )
        if check_paths and field.metadata.get("path") and item and not Path(item).exists():
            raise ConfigError(
                f"key '{name}': expected an existing path, found none at {item}; "
                f"{nearest_path(Path(item))}"
            )


def nearest_path(path: Path) -> str:
    """Where the path stops existing, and the closest name there."""
    parent = path.absolute().parent
    child = path.name
    while not parent.is_dir():
        parent, child = parent.parent, parent.name
    return f"in {parent}: {did_you_mean(child, [entry.name for entry in parent.iterdir()])}"


def describe(config_class: type) -> str:
    """The `--help` text: every key with type, default and meaning."""
    lines = ["usage: --config FILE.yaml key=value ...", "", "keys (type = default): meaning"]
    for name, hint, field in _fields(config_class):
        default = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()
        )  # type: ignore[misc]
        shown = "required" if default == MISSING else repr(default)
        choices = field.metadata.get("choices")
        lines.append(f"  {name} ({_type_name(hint)} = {shown})")
        lines.append(
            f"      {field.metadata['help']}" + (f" [{' | '.join(choices)}]" if choices else "")
        )
    return "\n".join(lines)


def _fields(
    config_class: type, prefix: str = ""
) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", hints[field.name], field


def to_dict(config: Any) -> dict[str, Any]:
    """A plain nested dict of the configuration, as stored in `config.yaml` and in checkpoints."""
    return dataclasses.asdict(config)


def make_assignments(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` words as scripts take them."""
    shown = {True: "true", False: "false", None: "null"}
    return [
        f"{name}={shown[value] if value is None or isinstance(value, bool) else value}"
        for name, value in settings.items()
    ]


def identity(config: Any) -> dict[str, Any]:
    """The keys that decide the result: no runtime keys and no paths (their contents are
    fingerprinted instead).
    """
    return {
        name: value
        for name, field, value in walk(config)
        if not field.metadata.get("runtime") and not field.metadata.get("path")
    }
