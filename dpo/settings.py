"""Where a configuration comes from, and what is wrong with it when it is wrong.

    experiments/NAME.toml (below it: what it extends) <- key=value of the command line -> Config, frozen
    the same with [sweep] <- sweep.key=values -> one Config an arm

No dimension letters. Read next: dpo/config.py, which declares the keys.
"""

import difflib
import functools
import hashlib
import itertools
import json
import re
import textwrap
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from dpo.config import Config
from dpo.judge.attacks import ATTACKS
from models.errors import UserError

COMMAND_LINE = "command line"
SWEEP = "sweep."  # before a key: not its value but the list of those that a sweep gives it
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
        lambda text: json.loads(text) if text[:1] == "[" else [one.strip() for one in text.split(",") if text],
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
            bounds = ", ".join(
                f"{words} {declared[bound]:,.12g}" for bound, words in BOUNDS.items() if bound in declared
            )
            allowed = "one of " + ", ".join(choices) if choices else f"{TYPES[declared['type']][0]} {bounds}".strip()
            found[dotted] = Key(declared["type"], allowed, choices, declared.get("default"), declared["description"])
    return found


def help_text() -> str:
    """What `--help` prints: the usage, the experiments, and every key with type, default and one line."""
    lines = [USAGE, textwrap.fill(_list_experiments(), 120), "", "general"]
    section = ""
    for name, key in keys().items():
        if (here := name.rpartition(".")[0]) != section:
            section = here
            lines += ["", f"{section}: {Config.model_fields[section].default.__doc__}"]
        default = "required" if key.default is None else f"default {_written(key.default)}"
        lines += [f"  {name} ({key.allowed}; {default})", f"      {key.help}"]
    return "\n".join(lines) + "\n"


def _written(value: object) -> str:
    """A value as one writes it: 5e-5, true, ["a", "b"], "text"; of a long one the beginning."""
    if isinstance(value, float):
        return re.sub(r"e([-+])0*", r"e\1", f"{value:.12g}").replace("e+", "e")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."


# Where it comes from --------------------------------------------------------------------------------------------------


Settings = dict[str, tuple[object, str]]  # by key: the value that somebody set, and in which file (or command line)


def unswept(argv: list[str]) -> str:
    """What to say of an experiment's table [sweep] where one run alone is asked for; "" of one without."""
    path = next((where for name, (_, where) in _read_all(argv).items() if name.startswith(SWEEP)), "")
    return f"{path} is not run: this is one training; python -m dpo.sweep runs them all" if path else ""


def load_config(argv: list[str]) -> Config:
    """The configuration that `exp=NAME key=value ...` asks for; a UserError names what is wrong with it, and where."""
    if swept := next((argument for argument in argv if argument.startswith(SWEEP)), ""):
        raise UserError(f"{swept} ({COMMAND_LINE}): only python -m dpo.sweep runs an arm for every value")
    return _checked({name: given for name, given in _read_all(argv).items() if not name.startswith(SWEEP)})


class Arm(NamedTuple):
    """One run of a sweep."""

    varied: dict[str, object]  # by axis, a swept key or "arm", the value (of "arm": the name) that is this run's
    sources: str  # the files that say so, or the command line
    argv: list[str]  # what dpo.train is given for it
    config: Config

    @property
    def setting(self) -> str:
        """What all runs have in common that differ from it in the seed alone."""
        told = (v if k == "arm" else f"{k}={v}" for k, v in self.varied.items() if k != "seed")
        return ", ".join(map(str, told)) or "trained"

    @property
    def name(self) -> str:
        """Its folder, ROOT/NAME-sweep/ARM, without what is before."""
        return Path(self.config.run.root).name


class Contrast(NamedTuple):
    """The comparison that a sweep is run for, named before: setting a less setting b, as `readout` has them."""

    a: str
    b: str
    readout: str


def load_sweep(argv: list[str]) -> list[Arm]:
    """The runs that [sweep] (or sweep.KEY=VALUES) asks for; a UserError as above.

    Every named set of keys in [[sweep.arm]], crossed with every combination of the lists, seeds innermost. An arm's run
    folder lies in ROOT/NAME-sweep/ARM, ARM being its name, keys and values.
    """
    settings = _read_all(argv)
    for name in ("contrast", "primary"):
        settings.pop(SWEEP + name, None)
    named, where = settings.pop(f"{SWEEP}arm", ([], ""))
    grid = {name.removeprefix(SWEEP): settings.pop(name) for name in list(settings) if name.startswith(SWEEP)}
    sets = _named_arms(named, where)
    if not grid and not sets:
        raise UserError(
            'nothing to sweep: write [sweep] "loss.beta" = [0.1, 0.5] in the file, or sweep.loss.beta=0.1,0.5'
        )
    if settings.get("run.resume", ("", ""))[0]:
        raise UserError(f"run.resume ({settings['run.resume'][1]}): a sweep goes on by itself; leave it out")
    for name, (values, source) in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name} = {_written(values)} ({source}): must be a list of the values that it is to have")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise UserError(f"{name} ({source}): has {_written(twice[0])} twice; leave one out")
    swept = {name: source for name, (_, source) in grid.items()}
    for name, source in [*swept.items(), *((name, where) for keys_of in sets.values() for name in keys_of)]:
        if name == "exp" or name.startswith("run."):
            raise UserError(f"{name} ({source}): cannot be swept, for the folders of its arms are the sweep's own")
        if settings.get(name, ("", ""))[1] == COMMAND_LINE:
            raise UserError(f"{name} ({COMMAND_LINE}): is swept by {source}; write {SWEEP}{name}= for other values")
    if both := next((name for keys_of in sets.values() for name in keys_of if name in grid), ""):
        raise UserError(f"{both} ({where}): is swept by {swept[both]} too; leave one out")
    sources = ", ".join(dict.fromkeys([*swept.values(), *[where] * bool(sets)]))
    given = [argument for argument in argv if not argument.startswith((SWEEP, "run.root="))]
    names = sorted(grid, key=lambda name: name == "seed")
    arms = []
    for arm, keys_of in (sets or {"": {}}).items():
        for values in itertools.product(*(grid[name][0] for name in names)):  # type: ignore[call-overload]
            varied = dict(zip(names, values, strict=True))
            set_here = {name: (value, where) for name, value in keys_of.items()}
            set_here |= {name: (value, swept[name]) for name, value in varied.items()}
            config = _checked(settings | set_here)
            texts = {key: of if isinstance(of, str) else json.dumps(of) for key, (of, _) in set_here.items()}
            axes = ({"arm": arm} if sets else {}) | varied
            folder = {key: str(of) if key == "arm" else texts[key] for key, of in axes.items()}
            root = Path(config.run.root) / f"{config.exp}-sweep" / _folder_name(folder)
            arguments = [*given, f"run.root={root}", *(f"{name}={text}" for name, text in texts.items())]
            arms.append(Arm(axes, sources, arguments, load_config(arguments)))
    return arms


def _named_arms(tables: object, where: str) -> dict[str, dict[str, object]]:
    """[[sweep.arm]]'s keys and values by its `name`."""
    example = f'({where}): write [[sweep.arm]], name = "ipo", loss.name = "ipo" for each'
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"sweep.arm = {_written(tables)} {example}")
    found: dict[str, dict[str, object]] = {}
    for table in tables:
        arm = _dotted(table)
        name = arm.pop("name", None)
        if not isinstance(name, str) or name in ("", "base"):
            raise UserError(f"sweep.arm: name = {_written(name)} must be a text, and not base {example}")
        if name in found:
            raise UserError(f"sweep.arm: the name {_written(name)} is there twice; each arm has its own {example}")
        if unknown := next((key for key in arm if key not in keys()), ""):
            raise _unknown_key(unknown, f"{where}, arm {name}")
        found[name] = arm
    return found


def load_contrast(argv: list[str], settings: Sequence[str], readouts: Sequence[str]) -> Contrast | None:
    """What [sweep.contrast] of the experiment says, of these settings of its sweep; None where it has none."""
    table, where = _read_all(argv).get(f"{SWEEP}contrast", (None, ""))
    if table is None:
        return None
    if not isinstance(table, dict) or set(table) != set(Contrast._fields):
        raise UserError(f"sweep.contrast = {_written(table)} ({where}): must have a, b and readout, and no more")
    for key, allowed in (("a", settings), ("b", settings), ("readout", readouts)):
        if table[key] not in allowed:
            raise UserError(f"sweep.contrast: {key} = {_written(table[key])} ({where}): one of {'; '.join(allowed)}")
    return Contrast(**table)


def load_primary(argv: list[str], readouts: Sequence[str]) -> str:
    """The readout that an experiment is about: sweep.primary, else its contrast's, else the first of `readouts`."""
    settings = _read_all(argv)
    table, _ = settings.get(f"{SWEEP}contrast", ({}, ""))
    named = table["readout"] if isinstance(table, dict) and table else readouts[0]
    primary, where = settings.get(f"{SWEEP}primary", (named, ""))
    if primary not in readouts or (table and primary != named):
        allowed = f"{_written(named)}, as its contrast has it" if table else f"one of {'; '.join(readouts)}"
        raise UserError(f"sweep.primary = {_written(primary)} ({where}): must be {allowed}")
    return str(primary)


def load_question(argv: list[str]) -> str:
    """The comment at the head of the experiment's file: question, hypothesis, primary metric."""
    path = _find_experiment(_split_arguments(argv)["exp"], COMMAND_LINE, Path())
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _folder_name(texts: dict[str, str]) -> str:
    """Readable and one's own: what a folder's name cannot hold becomes "_", told apart by a digest."""
    whole = ",".join(f"{name}={text}" for name, text in texts.items())
    safe = re.sub(r"[^\w.,=+-]", "_", whole)[:100]
    return safe if safe == whole else f"{safe}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _checked(settings: Settings) -> Config:
    config = _validate(settings)
    if fault := next(_check_together(config, settings), ""):
        raise UserError(fault)
    return config


def _read_all(argv: list[str]) -> Settings:
    """Every key that somebody set, and under sweep.KEY the values that a sweep is to give it."""
    arguments = _split_arguments(argv)
    exp = arguments.pop("exp", None)
    if exp is None:
        raise UserError(f"exp is missing: say which experiment, e.g. exp=quickstart; {_list_experiments()}")
    path = _find_experiment(exp, COMMAND_LINE, Path())
    settings = _read_settings(path, ())
    for name, text in arguments.items():
        if (key := keys().get(name.removeprefix(SWEEP))) is None:
            raise _unknown_key(name, COMMAND_LINE)
        settings[name] = ((_parse_values if name.startswith(SWEEP) else _parse)(key, text), COMMAND_LINE)
    settings["exp"] = (path.stem, COMMAND_LINE)
    return settings


def _split_arguments(argv: list[str]) -> dict[str, str]:
    arguments: dict[str, str] = {}
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals:
            near = f"exp={argument}" if argument in _experiments() else f"{_nearest_key(name) or ''}=VALUE"
            meant = f"did you mean {near}?" if near[0] != "=" else "--help lists all keys"
            raise UserError(f"{_written(argument)} ({COMMAND_LINE}): arguments have the form key=value; {meant}")
        if name in arguments:
            values = f"{_written(arguments[name])} and {_written(text)}"
            raise UserError(f"{name} ({COMMAND_LINE}): given twice, as {values}; leave one out")
        arguments[name] = text
    return arguments


def _parse(key: Key, text: str) -> object:
    """The text as a value of the key's type; as it stands where it is none, which _validate then refuses."""
    try:
        return TYPES[key.type][1](text)
    except (ValueError, KeyError, RecursionError):
        return text


def _parse_values(key: Key, text: str) -> object:
    """The text as a list of the key's values, which may stand in JSON or between commas."""
    values = _parse(key._replace(type="array"), text)
    if not isinstance(values, list):
        return text
    return [_parse(key, value) if isinstance(value, str) else value for value in values]


def _read_settings(path: Path, above: tuple[Path, ...]) -> Settings:
    """Every key that the file sets or inherits by `extends`; `above` are the files that extend it."""
    source = str(path)
    if path.resolve() in [file.resolve() for file in above]:
        raise UserError(f"{source}: extends itself: {' -> '.join(map(str, (*above, path)))}")
    try:
        table: dict[str, object] = tomllib.loads(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # plain ones too: of a number of 5,000 digits, of 1,000 brackets
        line = re.search(r"at line (\d+)", str(error))
        raise UserError(f"{source}{':' + line[1] if line else ''}: not valid TOML: {error}") from None
    below = table.pop("extends", None)
    sweep = table.pop("sweep", {})
    settings: Settings = {}
    if below is not None:
        if not isinstance(below, str):
            raise UserError(f'extends = {_written(below)} ({source}): must be one name or path, e.g. "quickstart"')
        settings = _read_settings(_find_experiment(below, source, path.parent), (*above, path))
    if "exp" in table:
        raise UserError(f"exp ({source}): is set on the command line only; to build on another file write extends")
    if not isinstance(sweep, dict):
        raise UserError(f'sweep = {_written(sweep)} ({source}): must be a table, [sweep] "loss.beta" = [0.1, 0.5]')
    for name in ("arm", "contrast", "primary"):
        if name in sweep:
            settings[SWEEP + name] = (sweep.pop(name), f"{source} [sweep.{name}]")
    for prefix, here, given_keys in (("", source, table), (SWEEP, f"{source} [sweep]", sweep)):
        for key, given in _dotted(given_keys).items():
            if key not in keys():
                raise _unknown_key(key, here)
            settings[prefix + key] = (given, here)
    return settings


def _dotted(table: dict[str, object]) -> dict[str, object]:
    """A file's keys by their dotted names, whether written as tables or not."""
    dotted: dict[str, object] = {}
    for name, value in table.items():
        if isinstance(value, dict) and (value or any(key.startswith(f"{name}.") for key in keys())):
            dotted |= {f"{name}.{key}": given for key, given in value.items()}
        else:
            dotted[name] = value
    return dotted


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
        raise UserError(f"there is no experiment {_written(name)} ({source}); {meant}{_list_experiments()}")
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
    near = SWEEP + near if near and name.startswith(SWEEP) else near
    name = name if name.isprintable() and len(name) <= 80 else _written(name)
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


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return sound and url.isascii() and not parts.path.rstrip("/").endswith("/completions")


def _check_together(config: Config, settings: Settings) -> Iterator[str]:
    """What is wrong of what is possible alone but not together."""

    def said(name: str) -> str:
        value, source = settings.get(name, (keys()[name].default, "default"))
        return f"{name} = {_written(value)} ({source})"

    if config.loss.swap_consistency and config.objective != "verdicts":
        yield (
            f"{said('loss.swap_consistency')}: compares a verdict with its twin in the other order, and "
            f"{said('objective')} has no twins; set objective=verdicts, or loss.swap_consistency=0"
        )
    mixed = any(text.partition(":")[0] == "rdpo" for text in config.loss.mix)
    of_lengths = {"ld_alpha": config.loss.ld_alpha != 1, "name": config.loss.name == "rdpo", "mix": mixed}
    if config.objective == "verdicts" and (key := next((key for key, on in of_lengths.items() if on), "")):
        yield (
            f"{said(f'loss.{key}')}: is about answers of unlike length, and a verdict has one; set "
            "objective=responses, or leave it out"
        )
    if config.data.orders == "one" and (config.objective != "verdicts" or config.loss.swap_consistency):
        yield (
            f"{said('data.orders')}: is for verdicts without a term over both orders; set objective=verdicts, "
            "loss.swap_consistency=0"
        )
    writes = config.objective == "critiques" or config.judge.critique != "off"
    if not writes and (ignored := next((name for name in settings if name.startswith("critiques.")), "")):
        yield f"{said(ignored)}: nothing reads it; set objective=critiques or judge.critique, or leave it out"
    if writes and config.critiques.max_tokens >= config.pack.tokens:
        yield f"{said('critiques.max_tokens')}: must leave room for the question in {said('pack.tokens')}"
    if config.objective == "critiques":
        replayed = "moe.routes" if config.moe.routes == "replay" else ""
        if name := "reference.path" if config.reference.path else replayed:
            yield f"{said(name)}: is not for objective=critiques, whose reference is each round's start; leave it out"
    adapted = config.lora.rank or config.model.adapter
    for name, value in config.lora.model_dump(exclude={"rank", "targets"}).items():
        if value and not adapted:
            yield f"{said(f'lora.{name}')}: there is no adapter, for {said('lora.rank')}; e.g. lora.rank=16"
    if config.train.num_cycles != 0.5 and config.train.schedule != "cosine":
        yield f"{said('train.num_cycles')}: {said('train.schedule')} has no waves; set train.schedule=cosine"
    if config.train.patience and config.train.select == "last":
        yield f"{said('train.patience')}: {said('train.select')} finds none better; set train.select=accuracy or loss"
    train = config.train.model_dump()
    for count, every in (("n_evals", "eval_every_steps"), ("n_checkpoints", "checkpoint_every_steps")):
        if train[count] and train[every]:
            both = f"{said(f'train.{count}')} and {said(f'train.{every}')}"
            yield f"{both}: say either how many or how often; set one of them to 0"
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        fractions = f"{said('data.validation_fraction')} and {said('data.test_fraction')}"
        yield f"{fractions}: leave no rows for training; together they must be < 1"
    url = config.endpoint.url
    if url and config.judge.critique != "off":
        yield (
            f"{said('judge.critique')}: is for a local model; for an endpoint set judge.template=compare_critique, "
            "endpoint.max_tokens=256"
        )
    if config.judge.self_preference and (url or config.judge.protocol == "choose"):
        yield (
            f"{said('judge.self_preference')}: is of a local model's verdicts on pairs; leave it out with endpoint.url "
            "and with judge.protocol=choose"
        )
    if bool(url) != bool(config.endpoint.model):
        yield f"{said('endpoint.url')} and {said('endpoint.model')}; set both, or none for a local model"
    if url and not _is_endpoint(url):
        yield f"{said('endpoint.url')}: must be http(s)://HOST[:PORT]/PATH that ends before /chat/completions"
    for name, families in (("data.attacks", config.data.attacks), ("judge.attacks", config.judge.attacks)):
        allowed = [*ATTACKS, *["all"] * (name == "judge.attacks")]
        if not set(families) <= set(allowed):
            yield f"{said(name)}: there is no such attack; allowed are {', '.join(allowed)}"
    if "data.format" in settings and config.data.path == "checkable":
        yield f"{said('data.format')}: checkable rows are made here; remove it, or set data.path to a file"
    for name in ("data.validation_fraction", "data.test_fraction"):
        if name in settings and config.data.path == "checkable":
            rows = name.replace("data.", "checkable.").replace("fraction", "rows")
            yield f"{said(name)}: checkable rows come split; set {rows} instead, or data.path to a file"
