"""The configuration: what can be set, where it comes from, and what is wrong with it when it is wrong.

    experiments/NAME.toml (below it: what it extends) <- key=value of the command line -> Config, frozen

Every key is one Field below: type, default, bounds and a line of help with the unit; `--help` and all messages are made
from these. A part of the program takes its own section. No dimension letters. Read next: dpo/train.py.
"""

import difflib
import functools
import json
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from models.errors import UserError

COMMAND_LINE = "command line"
USAGE = """\
usage: python -m dpo.train exp=NAME [key=value ...]
  python -m dpo.train exp=quickstart train.lr=1e-5 loss.beta=0.2
  python -m dpo.train exp=verdicts data.path=rows.jsonl seed=1

lists: comma-separated or JSON; numbers: 5e-5; switches: true, false"""

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # the shell leaves the ~ in key=~/rows.jsonl to us


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy's weights."""

    path: Place = Field("smollm2-135m-instruct", min_length=1, description="a folder, or this name, or tiny-random")


class DataConfig(Section):
    """The preference rows and their split."""

    path: Place = Field("checkable", min_length=1, description="checkable (made here), or a .jsonl or .parquet file")
    rows: int = Field(0, ge=0, description="most training rows, whole groups drawn after the split; 0 = all")
    pairs_per_row: int = Field(0, ge=0, description="first so many (chosen, rejected) pairs of a training row; 0 = all")
    split: Literal["group", "study"] = Field("group", description="by group without leaks, or the study's leaky way")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of the groups kept for validation")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="share of the groups kept for the test")


class CheckableConfig(Section):
    """The generated rows whose label code can prove (data.path=checkable)."""

    train_rows: int = Field(960, ge=1, description="training rows")
    validation_rows: int = Field(160, ge=0, description="validation rows")
    test_rows: int = Field(320, ge=1, description="test rows, of templates, topics, words and names unseen in training")
    subsets: list[str] = Field(
        ["Focus", "Precise IF", "Math", "Grounding"], min_length=1, description="in equal shares"
    )
    label_noise: float = Field(0.0, ge=0, lt=1, description="share of the training rows whose answers are swapped")
    length_confound: float = Field(0.0, ge=0, lt=1, description="share of the training rows with a padded right answer")
    difficulty: int = Field(2, ge=1, le=3, description="1 = easy, 3 = hard")
    rejected_per_row: Literal[1, 3] = Field(1, description="wrong answers in a row")


class PackConfig(Section):
    """The fixed shapes that everything is computed in."""

    tokens: int = Field(
        2048, ge=64, le=1_048_576, multiple_of=64, description="tokens of a packed batch; a branch must fit in it"
    )
    head_chunk: int = Field(128, ge=1, le=65_536, description="scored tokens that the output head takes at once")


class KernelsConfig(Section):
    """Which code computes the log-probs and the pairs' losses."""

    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="auto = the fastest there is; triton on a CPU needs TRITON_INTERPRET=1 (for tests)"
    )


class LossConfig(Section):
    """The preference loss."""

    name: str = Field("sigmoid", min_length=1, description="which loss: one of those listed at the end of --help")
    mix: list[str] = Field([], description="losses added to it, NAME:WEIGHT each, e.g. sft:0.1,ipo:0.5")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, 1/nat; ORPO's lambda, IPO's tau")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of wrong labels")
    reference_free: bool = Field(False, description="take the reference's log-ratio as 0")
    rpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answer's likelihood per token; 0 = off")
    ld_alpha: float = Field(1.0, ge=0, le=1, description="weight of tokens beyond the shorter answer's length; 1 = off")
    wpo: bool = Field(False, description="weigh a pair by its answers' probability per token under the policy (WPO)")
    swap_consistency: float = Field(
        0.0, ge=0, description="weight of (difference of a verdict's margins in both orders)^2, 1/nat^2; 0 = off"
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="from the reference, that shapes the log-ratios; reverse_kl = plain DPO"
    )
    divergence_alpha: float = Field(0.5, ge=0, le=2, description="order of alpha: 1 = reverse_kl, 0 = forward_kl")
    simpo_gamma: float = Field(0.5, ge=0, description="SimPO's target margin, reward units (beta * nats per token)")
    discopop_tau: float = Field(0.05, gt=0, description="DiscoPOP's temperature between its two halves")
    dpop_lambda: float = Field(50.0, ge=0, description="DPOP's weight of a fall of the chosen answer's log-prob")
    rdpo_alpha: float = Field(
        0.01, ge=0, description="R-DPO's reward for length to be taken off, reward units per token"
    )


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0 = full fine-tuning")
    alpha: float = Field(0.0, ge=0, description="the adapters are scaled by alpha / rank; 0 = alpha of 2 * rank")
    targets: list[str] = Field(["all-linear"], min_length=1, description="names of the adapted layers, or all-linear")


class TrainConfig(Section):
    """The training loop and its optimizer (AdamW)."""

    epochs: int = Field(1, ge=1, description="passes over the training rows")
    max_steps: int = Field(0, ge=0, description="optimizer steps at most; 0 = as many as the epochs have")
    batch_pairs: int = Field(16, ge=1, description="pairs that an optimizer step has at least (whole rows are taken)")
    pair_weight: Literal["pair", "row"] = Field("pair", description="a pair weighs 1, or 1 / pairs of its row")
    lr: float = Field(5e-5, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="shape after the warm-up")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps on which the rate rises from 0")
    min_lr_ratio: float = Field(0.0, ge=0, lt=1, description="rate at the end / peak rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, per step times the rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean, per step")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the squared gradient's mean, per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of the squared gradient's mean")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    eval_every_steps: int = Field(0, ge=0, description="steps between validations; 0 = only at the end")
    checkpoint_every_steps: int = Field(0, ge=0, description="steps between two, one at the end; 0 = only at Ctrl-C")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, the newest")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    select: Literal["averaged_accuracy", "accuracy", "loss", "last"] = Field(
        "averaged_accuracy", description="validation figure that picks the weights to judge and export"
    )


class ReferenceConfig(Section):
    """The reference policy and the store of its log-probs."""

    path: Place = Field("", description='another model folder as the reference; "" = the policy before training')
    store: Place = Field("", description='folder of the stored log-probs; "" = reference/ in run.cache')


class JudgeConfig(Section):
    """The judging of the held-out rows, before and after training."""

    sighted: bool = Field(True, description="the judge sees the request; false = only the two answers (blind)")
    rows: int = Field(0, ge=0, description="most test rows judged, whole groups drawn; 0 = all")
    pairs_per_row: int = Field(1, ge=0, description="first so many (chosen, rejected) pairs of a test row; 0 = all")
    blind_control: bool = Field(True, description="also judge blind, as one of the controls")


class LogConfig(Section):
    """Where the figures go besides the run folder."""

    wandb: Literal["off", "online", "offline"] = Field("off", description="log to Weights & Biases")
    project: str = Field("dpo-judges", min_length=1, description="project name there")
    plots: bool = Field(True, description="draw the plots of the report")


class RunConfig(Section):
    """Folders of runs and caches."""

    root: Place = Field("runs", min_length=1, description="runs go to ROOT/NAME/TIME-SEED")
    resume: Place = Field("", description="run folder to go on with, or latest")
    cache: Place = Field("", description='folder of imports and log-probs; "" = $DPO_CACHE or ~/.cache/dpo-judges')


class Config(Section):
    """All of it. `exp` is the bare name of the experiment, also where a path was given."""

    exp: str = Field(min_length=1, description="name of a file in experiments/ (without .toml), or a path to a .toml")
    objective: Literal["verdicts", "responses"] = Field("verdicts", description="train A/B verdicts, or the answers")
    seed: int = Field(0, ge=0, le=1_000_000_000, description="seed of rows, order, initial adapters and bootstrap")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda where there is a GPU")
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = Field("auto", description="auto = bf16 where native, else fp32")
    show: int = Field(0, ge=0, description="print so many trees with their scored tokens first")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    checkable: CheckableConfig = CheckableConfig()
    pack: PackConfig = PackConfig()
    kernels: KernelsConfig = KernelsConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    reference: ReferenceConfig = ReferenceConfig()
    judge: JudgeConfig = JudgeConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()


def config_dict(config: Config) -> dict[str, object]:
    """The configuration as plain JSON values; `Config(**...)` of it is equal to it."""
    return config.model_dump(mode="json")


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
    if config.lora.alpha > 0 and config.lora.rank == 0:
        raise UserError(f"{said('lora.alpha')}: has no adapter to scale, for {said('lora.rank')}; e.g. lora.rank=16")
    if config.data.validation_fraction + config.data.test_fraction >= 1:
        fractions = f"{said('data.validation_fraction')} and {said('data.test_fraction')}"
        raise UserError(f"{fractions}: leave no rows for training; together they must be < 1")
    for name in ("data.validation_fraction", "data.test_fraction"):
        if name in settings and config.data.path == "checkable":
            rows = name.replace("data.", "checkable.").replace("fraction", "rows")
            raise UserError(f"{said(name)}: checkable rows come split; set {rows} instead, or data.path to a file")
