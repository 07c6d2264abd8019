"""Mutated experiment files and command lines: each is read as a strict reading reads it, or refused by name."""

import json
import random
import re
import tomllib
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo.config import Config
from dpo.losses import check_loss
from dpo.settings import keys, load_config
from models.errors import UserError
from models.tokenizer import read_variables

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.toml"))
# What a message says where, and what is allowed or to be done.
PLACE = r"\(command line\)|x\.toml|experiments/\w+\.toml|exp is missing"
ADVICE = r"must be|did you mean|--help lists|not valid TOML|cannot be read|given twice|experiments: |extends itself|"
ADVICE += r"command line only|; \w+"
# What is wrong by itself; the rest are settings that are possible alone but not together (settings._check_together).
ALONE = r": must be|unknown key|not valid TOML|cannot be read|given twice|have the form|no experiment|extends itself|"
ALONE += r"command line only|exp is missing"
VALUES = ["0", "1", "-1", "2", "0.5", "-0.0", "1e-3", "1e400", "-inf", "nan", "inf", "true", "false", '""', '"x"']
VALUES += ["[]", '"auto"', '"bf16"', '"sigmoid"', '"smoke"', '["a"]', "[1]", '["a", 1]', '["sft:0.1"]', "{}", "{a=1}"]
VALUES += ["[[[]]]", "2026-01-01", "07:32:00", "0x10", "1_000", "1__0", "+3", "03", "64", "100", "1048576", "1048640"]
VALUES += [".5", "5.", "9223372036854775808", "1e-400", "'''a'''", '"\\u00e9"', '"\\ud800"', '"a\\nb"', '["q_proj",]']
VALUES += ['["a"', ""]
TEXTS = ["a,b", "a,,b", "[1", "٣", " 3 ", "1 2", "=", "x=y", "\udcff", "\x00", "\n", "💥", "True", "yes", "none"]
TEXTS += ["null", "~/x", "enable_thinking=false", "Infinity", "1e", "[NaN]", '{"a": 1}']
TEXTS += [*VALUES, "9" * 5000, "[" * 99_999, "0" * 50]


def seeds() -> list[str]:
    """The repository's experiments, one that extends another, and one that sets every key, most to their defaults."""
    sections: dict[str, list[str]] = {}
    for name, key in keys().items():
        section, _, field = name.rpartition(".")
        if name != "exp":
            value = "rows.jsonl" if name == "data.path" else key.default  # checkable rows forbid some other keys
            sections.setdefault(section, []).append(f"{field} = {json.dumps(value)}")
    everything = "\n".join("\n".join([f"[{name}]" if name else "", *lines]) for name, lines in sections.items())
    files = [text for text in map(Path.read_text, EXPERIMENTS) if "[sweep]" not in text]  # a sweep has its own tests
    return [*files, 'extends = "smoke"\nseed = 3\n[loss]\nbeta = 1\n', everything]


# Mutations of a file ------------------------------------------------------------------------------------------------


def mutate_bytes(text: str, chance: random.Random) -> bytes:
    data = bytearray(text.encode("utf-8"))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        piece = chance.choice(
            [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b'"', b"=", b"[", b"]", b"#", b".", b"\n"]
        )
        piece = chance.choice([piece, bytes([chance.randrange(256)])])
        data[at : at + chance.choice([0, 0, 1, 5])] = chance.choice([piece, b""])
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data)


def mutate_lines(text: str, chance: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines))
        name, equals, rest = lines[at].partition(" = ")
        some = chance.choice(list(keys()))
        value = chance.choice(VALUES)
        changes = [
            [f"{name} = {value}"] if equals else [],
            [f"{name} = {value}"] if equals else [f"[{some}]"],
            [f"{mutate_word(name, chance)} = {rest}"],
            [lines[at], lines[at]],
            [],
            [f"{some} = {value}", lines[at]],
            [chance.choice(lines)],
            [f"extends = {value}", lines[at]],
            [f"{name} = {chance.choice(['[' * 3000, '9' * 5000])}"],
            [f"[{some.partition('.')[0]}]", lines[at]],
        ]
        lines[at : at + 1] = chance.choice(changes)
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8")


def mutate_word(word: str, chance: random.Random) -> str:
    at = chance.randrange(len(word) + 1)
    return chance.choice([word.upper(), word[:at] + word[at + 1 :], word[:at] + chance.choice("_.-é \t") + word[at:]])


def mutate_arguments(chance: random.Random) -> list[str]:
    arguments = ["exp=x"]
    for _ in range(chance.randint(0, 3)):
        name = chance.choice(list(keys()))
        name = mutate_word(name, chance) if chance.random() < 0.1 else name
        default = keys().get(name, keys()["seed"]).default
        usual = default if isinstance(default, str) else json.dumps(default)
        text = chance.choice(TEXTS) if chance.random() < 0.4 else usual
        arguments.append(f"{name}={text}" if chance.random() < 0.95 else name + text[:20])
    chance.shuffle(arguments)
    return arguments


# The strict reading: pydantic on what tomllib and plain parsers say ---------------------------------------------------


def strict(argv: list[str], file: Path) -> Config | None:
    """The configuration that these mean to the letter, or None where they mean none."""
    try:
        tables = strict_file(file)
        for argument in argv:
            name, equals, text = argument.partition("=")
            section, _, field = name.rpartition(".")
            if not equals or [other.partition("=")[0] for other in argv].count(name) > 1 or name not in keys():
                return None
            if name != "exp":
                table = tables.setdefault(section, {}) if section else tables
                assert isinstance(table, dict)
                table[field] = strict_text(text, keys()[name].type)
            elif text != "x":
                return None
        return Config.model_validate({**tables, "exp": "x"})
    except (ValidationError, ValueError, InvalidOperation, KeyError, RecursionError, OverflowError):
        return None


def strict_file(file: Path) -> dict[str, object]:
    tables: dict[str, object] = tomllib.loads(file.read_bytes().decode("utf-8"))
    tables.pop("sweep", None)
    if "exp" in tables:
        raise ValueError("exp in a file")
    below = tables.pop("extends", None)
    merged: dict[str, object] = {}
    if below is not None:
        base = {path.stem: path for path in EXPERIMENTS}[str(below)] if isinstance(below, str) else None
        if base is None:
            raise ValueError("extends no name")
        merged = strict_file(base)
    for name, value in tables.items():
        over = merged.get(name)
        merged[name] = {**over, **value} if isinstance(over, dict) and isinstance(value, dict) else value
    return merged


def strict_text(text: str, kind: str) -> object:
    if kind == "array":
        return json.loads(text) if text[:1] == "[" else [part.strip() for part in text.split(",")] if text else []
    if kind == "integer":
        return int(text) if Decimal(text) == int(text) else None
    if kind == "number":
        return float(Decimal(text.strip() if "__" not in text else "two underscores"))
    return {"true": True, "false": False}[text] if kind == "boolean" else text


def check_cases(count: int, seed: int, folder: Path) -> int:
    """Run `count` mutated cases; how many of them were read."""
    chance = random.Random(seed)
    files, read = seeds(), 0
    path = folder / "experiments" / "x.toml"
    path.parent.mkdir()
    for number in range(count):
        text = chance.choice(files)
        data = chance.choice([mutate_bytes, mutate_lines])(text, chance) if number % 3 else text.encode("utf-8")
        path.write_bytes(data)
        argv = ["exp=x"] if number % 3 == 1 else mutate_arguments(chance)
        case = f"case {number} of seed {seed}: {argv!r:.2000}\n{data!r:.2000}"
        meant = strict(argv, path)
        try:
            config = load_config(argv)
        except UserError as error:
            message = str(error)
            assert re.search(PLACE, message) and re.search(ADVICE, message), f"{message}\n{case}"
            assert "\n" not in message and len(message) < 2000, f"{message}\n{case}"
            assert meant is None or not re.search(ALONE, message), f"refused: {message}\n{case}"
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error
        else:
            read += 1
            assert config == meant, case
            try:
                check_loss(config.loss, ())
                read_variables(config.model.template_variables)
            except UserError as error:
                assert re.match(r"(loss|model)\.\w+( = |: )", str(error)), f"{error}\n{case}"
    return read


def test_mutated_configurations_are_read_to_the_letter_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert 50 < check_cases(500, 0, tmp_path) < 450


@pytest.mark.long
def test_ten_thousand_mutated_configurations_are_read_to_the_letter_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert 1000 < check_cases(10_000, 1, tmp_path) < 9000
