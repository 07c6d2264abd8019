"""dpo/config.py, dpo/settings.py: what is set is what is read; a mistake is named with place, value and a way out."""

import json
import re
from pathlib import Path

import pydantic
import pytest

from dpo.config import Config, config_dict
from dpo.settings import help_text, keys, load_config
from models.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own with experiments/, where `base` is a plain experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    write(tmp_path, "base", "seed = 1\n[train]\nlr = 1e-3\nbatch_pairs = 4\n[loss]\nbeta = 0.5\n")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / "experiments" / f"{name}.toml").write_text(text)


def message_of(*argv: str) -> str:
    """The one message that these arguments earn; never in pydantic's words."""
    with pytest.raises(UserError) as error:
        load_config(list(argv))
    message = str(error.value)
    assert not re.search(r"pydantic|validation error|input_value|https?:|\[type=", message), message
    assert "\n" not in message
    return message


def test_file_goes_above_defaults_and_command_line_above_file(folder: Path) -> None:
    config = load_config(["exp=base", "train.lr=2e-4", "data.path=rows.jsonl"])
    assert (config.exp, config.seed, config.loss.beta, config.train.batch_pairs) == ("base", 1, 0.5, 4)
    assert (config.train.lr, config.data.path) == (2e-4, "rows.jsonl")
    assert config.train.epochs == 1


def test_an_experiment_can_be_a_path_and_keeps_its_bare_name(folder: Path) -> None:
    (folder / "elsewhere.toml").write_text('extends = "experiments/base.toml"\nseed = 7\n')
    config = load_config([f"exp={folder / 'elsewhere.toml'}"])
    assert (config.exp, config.seed, config.train.lr) == ("elsewhere", 7, 1e-3)


def test_the_experiments_of_the_repository_are_found_from_anywhere(folder: Path) -> None:
    assert load_config(["exp=smoke"]).model.path == "tiny-random"


def test_extends_merges_key_by_key_through_several_files(folder: Path) -> None:
    write(folder, "middle", 'extends = "base"\n[train]\nlr = 1e-4\n')
    write(folder, "top", 'extends = "middle.toml"\n[train]\nepochs = 2\n')
    train = load_config(["exp=top"]).train
    assert (train.lr, train.epochs, train.batch_pairs) == (1e-4, 2, 4)


def test_a_sweep_table_is_left_to_the_sweep(folder: Path) -> None:
    write(folder, "swept", 'extends = "base"\n[sweep]\n"loss.beta" = [0.1, 0.2]\n')
    assert load_config(["exp=swept"]).loss.beta == 0.5


@pytest.mark.parametrize(
    ("argument", "section", "name", "value"),
    [
        ("train.lr=5e-5", "train", "lr", 5e-5),
        ("train.clip_norm=0", "train", "clip_norm", 0.0),
        ("train.max_steps=12", "train", "max_steps", 12),
        ("judge.sighted=false", "judge", "sighted", False),
        ("log.plots=true", "log", "plots", True),
        ("checkable.subsets=Math, Focus", "checkable", "subsets", ["Math", "Focus"]),
        ('lora.targets=["q_proj", "a,b"]', "lora", "targets", ["q_proj", "a,b"]),
        ("checkable.rejected_per_row=3", "checkable", "rejected_per_row", 3),
        ("run.resume=runs/a=b", "run", "resume", "runs/a=b"),
        ("data.path=1", "data", "path", "1"),
        ("reference.path=", "reference", "path", ""),
    ],
)
def test_an_override_is_read_by_the_type_of_its_key(
    folder: Path, argument: str, section: str, name: str, value: object
) -> None:
    read = config_dict(load_config(["exp=base", argument]))[section]
    assert isinstance(read, dict)
    assert read[name] == value
    assert type(read[name]) is type(value)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("train.lr=fast", ['train.lr = "fast" (command line): must be a number > 0; e.g. train.lr=5e-5']),
        ("train.lr=-1", ["train.lr = -1 (command line): must be a number > 0"]),
        ("train.lr=nan", ["train.lr", "must be a number > 0"]),
        ("loss.beta=inf", ["loss.beta", "must be a number > 0"]),
        ("loss.beta=0", ["loss.beta = 0 ", "must be a number > 0; e.g. loss.beta=0.1"]),
        ("loss.label_smoothing=0.5", ["must be a number >= 0, < 0.5"]),
        ("loss.ld_alpha=1.5", ["loss.ld_alpha = 1.5", ">= 0, <= 1"]),
        ("loss.divergence=jsd", ['loss.divergence = "jsd"', "one of reverse_kl, forward_kl, js, alpha"]),
        ("loss.discopop_tau=0", ["loss.discopop_tau = 0", "> 0"]),
        ("data.test_fraction=1", ["data.test_fraction", ">= 0, < 1"]),
        ("pack.tokens=100", ["pack.tokens = 100", "a multiple of 64"]),
        ("pack.tokens=0", ["pack.tokens", ">= 64"]),
        ("seed=1.5", ['seed = "1.5"', "a whole number >= 0"]),
        ("judge.sighted=yes", ['judge.sighted = "yes"', "true or false"]),
        ("train.schedule=liner", ["one of linear, cosine, constant; did you mean linear?"]),
        ("checkable.rejected_per_row=2", ["checkable.rejected_per_row", "one of 1, 3"]),
        ("checkable.difficulty=4", ["checkable.difficulty = 4", ">= 1, <= 3"]),
        ("checkable.label_noise=1.5", ["checkable.label_noise = 1.5", ">= 0, < 1"]),
        ("checkable.test_rows=-4", ["checkable.test_rows = -4", ">= 1"]),
        ("data.split=random", ["data.split", "one of group, study"]),
        ("data.validation_fraction=-0.1", ["data.validation_fraction = -0.1", ">= 0, < 1"]),
        ("checkable.subsets=", ["checkable.subsets = []", "a list of length >= 1"]),
        ("checkable.subsets=[1, 2]", ["checkable.subsets = [1, 2]", "a list"]),
        ("data.path=", ['data.path = ""', "text of length >= 1"]),
        ("train.learning_rate=1", ["unknown key train.learning_rate (command line); did you mean train.lr?"]),
        ("lr=1", ["unknown key lr (command line); did you mean train.lr?"]),
        ("--seed=1", ["unknown key --seed", "did you mean seed?"]),
        ("loss.bata=1", ["did you mean loss.beta?"]),
        ("zzzz=1", ["unknown key zzzz (command line); --help lists all keys"]),
        ("train=1", ["unknown key train (command line)"]),
        ("a\nb=1", ['unknown key "a\\nb" (command line)']),
        ("lora.targets=" + "[" * 99_999, ['lora.targets = "[[[', "[...", "(command line): must be a list"]),
        ("seed", ['"seed" (command line)', "key=value; did you mean seed=VALUE?"]),
        ("smoke", ["did you mean exp=smoke?"]),
        ("lora.alpha=8", ["lora.alpha = 8 (command line)", "lora.rank = 0 (default)", "lora.rank=16"]),
        ("lora.dropout=0.1", ["lora.dropout = 0.1 (command line)", "no adapter", "lora.rank=16"]),
        ("train.num_cycles=2", ["train.num_cycles = 2 (command line)", "has no waves; set train.schedule=cosine"]),
        ("data.validation_fraction=0.8", ["data.validation_fraction = 0.8 (command line)", "0.2 (default)", "< 1"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(folder: Path, argument: str, parts: list[str]) -> None:
    message = message_of("exp=base", argument)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[train]\nlr = "fast"\n', ['train.lr = "fast" (experiments/x.toml): must be a number > 0']),
        ("seed = true\n", ["seed = true (experiments/x.toml): must be a whole number"]),
        ("[judge]\nsighted = 1\n", ["judge.sighted = 1 (experiments/x.toml): must be true or false"]),
        ("[train]\nepochs = 1.0\n", ["train.epochs = 1 (experiments/x.toml): must be a whole number"]),
        ("seed = 2026-01-01\n", ["seed", "experiments/x.toml"]),
        ("[train.lr]\nx = 1\n", ['train.lr = {"x": 1} (experiments/x.toml): must be a number']),
        ("[optimizer]\nlr = 1.0\n", ["unknown key optimizer.lr (experiments/x.toml); did you mean train.lr?"]),
        ("[trane]\nlr = 1.0\n", ["unknown key trane.lr (experiments/x.toml); did you mean train.lr?"]),
        ("train = 3\n", ["unknown key train (experiments/x.toml); did you mean train."]),
        ('exp = "y"\n', ["exp (experiments/x.toml)", "command line only"]),
        ("seed = 1\n[train\nlr = 1\n", ["experiments/x.toml:2: not valid TOML"]),
        ("seed = 1\rshow = 1\n", ["experiments/x.toml:1: not valid TOML"]),
        (f"seed = {'9' * 5000}\n", ["experiments/x.toml: not valid TOML"]),
        (f"seed = {'[' * 5000}\n", ["experiments/x.toml: not valid TOML"]),
        ("[seed]\n", ["seed = {} (experiments/x.toml): must be a whole number"]),
        ("[trane]\n", ["unknown key trane (experiments/x.toml); did you mean train."]),
        ("extends = 3\n", ["extends = 3 (experiments/x.toml)"]),
        ('extends = "x"\n', ["experiments/x.toml", "extends itself"]),
        ('extends = "bass"\n', ['no experiment "bass" (experiments/x.toml); did you mean base?']),
        ('extends = "gone.toml"\n', ['"gone.toml" (experiments/x.toml)']),
    ],
)
def test_a_wrong_file_is_named_with_its_mistake(folder: Path, text: str, parts: list[str]) -> None:
    write(folder, "x", text)
    message = message_of("exp=x")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("count", "every"), [("n_evals", "eval_every_steps"), ("n_checkpoints", "checkpoint_every_steps")]
)
def test_how_many_and_how_often_exclude_each_other(folder: Path, count: str, every: str) -> None:
    message = message_of("exp=base", f"train.{count}=3", f"train.{every}=2")
    assert f"train.{count} = 3 (command line) and train.{every} = 2 (command line)" in message


def test_a_swap_penalty_without_twins_says_what_to_do(folder: Path) -> None:
    message = message_of("exp=base", "objective=responses", "loss.swap_consistency=0.1")
    assert "loss.swap_consistency = 0.1 (command line)" in message and 'objective = "responses" (command' in message
    assert "has no twins; set objective=verdicts, or loss.swap_consistency=0" in message
    assert load_config(["exp=base", "loss.swap_consistency=0.1"]).loss.swap_consistency == 0.1


@pytest.mark.parametrize("given", ["loss.ld_alpha=0.5", "loss.name=rdpo", "loss.mix=rdpo:0.5"])
def test_what_is_about_lengths_is_not_for_verdicts_which_have_one(folder: Path, given: str) -> None:
    key = given.partition("=")[0]
    assert re.search(rf"{key} = .*\(command line\): is about answers of unlike length", message_of("exp=base", given))
    assert load_config(["exp=base", given, "objective=responses"])


def test_patience_needs_something_that_can_be_better(folder: Path) -> None:
    message = message_of("exp=base", "train.patience=2", "train.select=last")
    assert 'train.patience = 2 (command line): train.select = "last" (command line) finds none better' in message


def test_a_mix_of_losses_is_a_list_on_the_command_line_and_in_a_file(folder: Path) -> None:
    write(folder, "mixed", '[loss]\nmix = ["sft:0.1", "ipo:2"]\n')
    from_file, typed = load_config(["exp=mixed"]), load_config(["exp=base", "loss.mix=sft:0.1,ipo:2"])
    assert from_file.loss.mix == typed.loss.mix == ["sft:0.1", "ipo:2"]


def test_a_mistake_in_an_extended_file_is_named_there(folder: Path) -> None:
    write(folder, "below", "[loss]\nbeta = -1.0\n")
    write(folder, "above", 'extends = "below"\nseed = 2\n')
    assert "loss.beta = -1 (experiments/below.toml)" in message_of("exp=above")
    assert load_config(["exp=above", "loss.beta=0.2"]).loss.beta == 0.2


def test_a_cycle_through_two_files_is_told_in_its_order(folder: Path) -> None:
    write(folder, "one", 'extends = "two"\n')
    write(folder, "two", 'extends = "one"\n')
    message = message_of("exp=one")
    assert "experiments/one.toml -> experiments/two.toml -> experiments/one.toml" in message


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "experiments" / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert "experiments/bytes.toml: cannot be read" in message_of("exp=bytes")


def test_a_missing_or_unknown_experiment_lists_those_there_are(folder: Path) -> None:
    assert re.search(r"exp is missing.*experiments: .*base.*smoke", message_of("train.lr=1"))
    assert re.search(r'no experiment "smok".*did you mean smoke\?.*experiments: .*base', message_of("exp=smok"))
    assert 'no experiment ""' in message_of("exp=")
    assert "none.toml" in message_of("exp=none.toml")


def test_a_key_given_twice_is_refused(folder: Path) -> None:
    assert 'seed (command line): given twice, as "1" and "2"' in message_of("exp=base", "seed=1", "seed=2")
    assert "exp (command line): given twice" in message_of("exp=base", "exp=base")


def test_config_dict_is_json_and_comes_back_equal(folder: Path) -> None:
    config = load_config(["exp=base", "checkable.subsets=Math", "lora.rank=4"])
    assert Config(**json.loads(json.dumps(config_dict(config)))) == config


def test_a_config_is_frozen(folder: Path) -> None:
    config = load_config(["exp=base"])
    with pytest.raises(pydantic.ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]


def test_help_names_every_key_with_its_default_and_a_line(folder: Path) -> None:
    lines = help_text().splitlines()
    assert lines[0].startswith("usage: python -m dpo.train exp=NAME")
    assert len(keys()) > 50
    for name, key in keys().items():
        at = [number for number, line in enumerate(lines) if line.startswith(f"  {name} (")]
        assert len(at) == 1, name
        assert key.allowed in lines[at[0]]
        assert ("required" if name == "exp" else "default ") in lines[at[0]]
        assert lines[at[0] + 1].strip() == key.help
    assert any("train.lr (a number > 0; default 5e-5)" in line for line in lines)
    assert max(map(len, lines)) <= 150
