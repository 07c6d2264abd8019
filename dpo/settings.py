"""Where a configuration comes from, and what is wrong with it when it is wrong.

    experiments/NAME.toml (below it: what it extends) <- key=value of the command line -> Config, frozen

No dimension letters. Read next: dpo/config.py, which declares the keys.
"""

import difflib
import functools
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from dpo.config import Config
from models.errors import UserError

COMMAND_LINE = "command line"
USAGE = """\
usage: python -m dpo.train exp=NAME [key=value ...]
  python -m dpo.train exp=quickstart train.lr=1e-5 loss.beta=0.2
  python -m dpo.train exp=verdicts data.path=rows.jsonl seed=1

lists: comma-separated or JSON; numbers: 5e-5; switches: true, false"""

# What may be set ------------------------------------------------------------------------------------------------------

TYPES: dict[str, tuple[str, Callable[[str], object]]] = {  # in words, and how the command line's text is read
    "boolean": ("true or false", {"true": True, "false": False}.__getitem__),
    "integer": ("a whole number", int),
    "number": ("a number", float),
    "string": ("text", str),
    "array": (
        "a list",
        lambda text: json.loads(text) if text[:1] == "[" else [part.strip() for part in text.split(",") if part],
    ),
}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
BOUNDS |= {"multipleOf": "a multiple of", "minLength": "of length >=", "minItems": "of length >="}


class Key(NamedTuple):
    """One settable key, as its Field declares it."""

    type: str  # a key of TYPES
    allowed: str  # in words
    choices: list[str]
    default: object
    help: str


@functools.cache
def keys() -> dict[str, Key]:
    """Every settable key by its dotted name, in the order of declaration."""
    schema = Config.model_json_schema()
    found: dict[str, Key] = {}
    for name, root in schema["properties"].items():
        fields = {name: root}
        if "$ref" in root:
            section = schema["$defs"][root["$ref"].rpartition("/")[2]]
            fields = {f"{name}.{field}": declared for field, declared in section["properties"].items()}
        for dotted, declared in fields.items():
            choices = [str(choice) for choice in declared.get("enum", ())]
            bounds = ", ".join(f"{words} {declared[bound]:g}" for bound, words in BOUNDS.items() if bound in declared)
            allowed = "one of " + ", ".join(choices) if choices else f"{TYPES[declared['type']][0]} {bounds}".strip()
            found[dotted] = Key(declared["type"], allowed, choices, declared.get("default"), declared["description"])
    return found


def help_text() -> str:
    """What `--help` prints: the usage, the experiments, and every key with type, default and one line."""
    lines = [USAGE, _list_experiments(), "", "general"]
    section = ""
    for name, key in keys().items():
        if (here := name.rpartition(".")[0]) != section:
            section = here
            lines += ["", f"{section}: {Config.model_fields[section].default.__doc__}"]
        default = "required" if key.default is None else f"default {_written(key.default)}"
        lines += [f"  {name} ({key.allowed}; {default})", f"      {key.help}"]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    """A value as one writes it: 5e-5, true, ["a", "b"], "text"."""
    if isinstance(value, float):
        return re.sub(r"e([-+])0*", r"e\1", f"{value:.12g}").replace("e+", "e")
    return json.dumps(value, ensure_ascii=False, default=str)


# Where it comes from --------------------------------------------------------------------------------------------------


Settings = dict[str, tuple[object, str]]  # by key: the value that somebody set, and in which file (or command line)


def load_config(argv: list[str]) -> Config:
    """The configuration that `exp=NAME key=value ...` asks for; a UserError names what is wrong with it, and where."""
    arguments = _split_arguments(argv)
    exp = arguments.pop("exp", None)
    if exp is None:
        raise UserError(f"exp is missing: say which experiment, e.g. exp=quickstart; {_list_experiments()}")
    path = _find_experiment(exp, COMMAND_LINE, Path())
    settings = _read_settings(path, ())
    for name, text in arguments.items():
        if name not in keys():
            raise _unknown_key(name, COMMAND_LINE)
        settings[name] = (_parse(keys()[name], text), COMMAND_LINE)
    settings["exp"] = (path.stem, COMMAND_LINE)
    config = _validate(settings)
    _check_together(config, settings)
    return config


def _split_arguments(argv: list[str]) -> dict[str, str]:
    arguments: dict[str, str] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals:
            meant = f"exp={argument}" if argument in _experiments() else f"{_nearest_key(name) or 'seed'}=VALUE"
            raise UserError(f'"{argument}" ({COMMAND_LINE}): arguments have the form key=value; did you mean {meant}?')
        if name in arguments:
            raise UserError(f'{name} ({COMMAND_LINE}): given twice, as "{arguments[name]}" and "{text}"; leave one out')
        arguments[name] = text
    return arguments


def _parse(key: Key, text: str) -> object:
    """The text as a value of the key's type; as it stands where it is none, which _validate then refuses."""
    try:
        return TYPES[key.type][1](text)
    except (ValueError, KeyError):
        return text


def _read_settings(path: Path, above: tuple[Path, ...]) -> Settings:
    """Every key that the file sets or inherits by `extends`; `above` are the files that extend it."""
    source = str(path)
    if path.resolve() in [file.resolve() for file in above]:
        raise UserError(f"{source}: extends itself: {' -> '.join(map(str, (*above, path)))}")
    try:
        table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise UserError(f"{source}{':' + line[1] if line else ''}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    below = table.pop("extends", None)
    table.pop("sweep", None)  # the sweep's own business
    settings: Settings = {}
    if below is not None:
        if not isinstance(below, str):
            raise UserError(f'extends = {_written(below)} ({source}): must be one name or path, e.g. "quickstart"')
        settings = _read_settings(_find_experiment(below, source, path.parent), (*above, path))
    for name, value in table.items():
        if name == "exp":
            raise UserError(f"exp ({source}): is set on the command line only; to build on another file write extends")
        values = {f"{name}.{key}": given for key, given in value.items()} if isinstance(value, dict) else {name: value}
        for key, given in values.items():
            if key not in keys():
                raise _unknown_key(key, source)
            settings[key] = (given, source)
    return settings


def _experiments() -> dict[str, Path]:
    """Experiment files by name: those of ./experiments, then those that lie beside the package."""
    folders = (Path(__file__).parents[1] / "experiments", Path("experiments"))
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}


def _list_experiments() -> str:
    return f"experiments: {', '.join(sorted(_experiments())) or 'none in ./experiments'} (or a path to a .toml)"


def _find_experiment(name: str, source: str, folder: Path) -> Path:
    """The file of a name, or of a path (it ends in .toml) relative to `folder`."""
    found = folder / name if name.endswith(".toml") else _experiments().get(name)
    if found is None or not found.is_file():
        near = difflib.get_close_matches(name, _experiments(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f'there is no experiment "{name}" ({source}); {meant}{_list_experiments()}')
    return found


# What is wrong with it ------------------------------------------------------------------------------------------------


def _nearest_key(name: str) -> str | None:
    """The key that was meant: spelt nearly so, else with the same last part (or its initials: lr), else spelt alike."""
    last = name.rpartition(".")[2].lstrip("-")
    initials = "".join(word[:1] for word in last.split("_"))
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys())}
    near = difflib.get_close_matches(name, keys(), n=1, cutoff=0.85)
    near += [by_last[part] for part in (last, initials) if part in by_last]
    near += difflib.get_close_matches(name, keys(), n=1)
    near += [by_last[part] for part in difflib.get_close_matches(last, by_last, n=1)]
    return near[0] if near else None


def _unknown_key(name: str, source: str) -> UserError:
    near = _nearest_key(name)
    return UserError(f"unknown key {name} ({source}); {f'did you mean {near}? ' if near else ''}--help lists all keys")


def _validate(settings: Settings) -> Config:
    tables: dict[str, dict[str, object]] = defaultdict(dict)
    for name, (value, _) in settings.items():
        section, _, field = name.rpartition(".")
        tables[section][field] = value
    try:
        return Config.model_validate(tables.pop("") | tables)
    except ValidationError as error:
        place = error.errors()[0]["loc"]  # ("train", "lr"), or ("checkable", "subsets", 0)
        name = next(name for name in settings if tuple(name.split(".")) == place[: name.count(".") + 1])
    key, (value, source) = keys()[name], settings[name]
    near = difflib.get_close_matches(str(value), key.choices, n=1)
    advice = f"did you mean {near[0]}?" if near else f"e.g. {name}={_written(key.default)}"
    raise UserError(f"{name} = {_written(value)} ({source}): must be {key.allowed}; {advice}")


def _check_together(config: Config, settings: Settings) -> None:
    """What is possible alone but not together."""

    def said(name: str) -> str:
        value, source = settings.get(name, (keys()[name].default, "default"))
        return f"{name} = {_written(value)} ({source})"

    if config.loss.swap_consistency and config.objective != "verdicts":
        raise UserError(
            f"{said('loss.swap_consistency')}: compares a verdict with its twin in the other order, and "
            f"{said('objective')} has no twins; set objective=verdicts, or loss.swap_consistency=0"
        )
    adapted = config.lora.rank or config.model.adapter
    for name, value in config.lora.model_dump(exclude={"rank", "targets"}).items():
        if value and not adapted:
            raise UserError(f"{said(f'lora.{name}')}: there is no adapter, for {said('lora.rank')}; e.g. lora.rank=16")
    if config.train.num_cycles != 0.5 and config.train.schedule != "cosine":
        raise UserError(f"{said('train.num_cycles')}: {said('train.schedule')} has no waves; set train.schedule=cosine")
    train = config.train.model_dump()
    for count, every in (("n_evals", "eval_every_steps"), ("n_checkpoints", "checkpoint_every_steps")):
        if train[count] and train[every]:
            both = f"{said(f'train.{count}')} and {said(f'train.{every}')}"
            raise UserError(f"{both}: say either how many or how often; set one of them to 0")
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        fractions = f"{said('data.validation_fraction')} and {said('data.test_fraction')}"
        raise UserError(f"{fractions}: leave no rows for training; together they must be < 1")
    for name in ("data.validation_fraction", "data.test_fraction"):
        if name in settings and config.data.path == "checkable":
            rows = name.replace("data.", "checkable.").replace("fraction", "rows")
            raise UserError(f"{said(name)}: checkable rows come split; set {rows} instead, or data.path to a file")
