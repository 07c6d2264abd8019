"""The whole command on bad input: exit code 2, one line `error: ...` that says what and where, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dpo.train
from dpo import report
from dpo.judge import __main__ as judge
from dpo.rows import read_rows
from dpo.train import main
from models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
Refused = Callable[..., str]


def row(n: int, **other: object) -> dict[str, object]:
    prompt, answers = f"What is {n} + 1?", {"chosen": [f"It is {n + 1}."], "rejected": [f"It is {n + 2}."]}
    return {"id": f"r{n}", "subset": "Math", "prompt": prompt, **answers, **other}


def write_rows(path: Path, rows: list[dict[str, object]], **changed: str | None) -> Path:
    """The rows as JSONL; `line3="text"` puts another text for line 3."""
    lines = [json.dumps(value) for value in rows]
    for name, text in changed.items():
        lines[int(name.removeprefix("line")) - 1] = str(text)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def check_refusal(code: int, out: str, err: str, place: Path) -> str:
    assert (code, out) == (2, ""), f"exit code {code}\n{out}{err}"
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    kept = [path.relative_to(place / "cache").parts for path in (place / "cache").glob("**/*")]
    halves = [parts for parts in kept if parts[0] != "tokens" or parts[-1].startswith(".")]
    assert not (place / "runs").exists() and not halves, "something was written besides whole trees"
    return err


@pytest.fixture
def refused(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs exp=smoke on the tiny model with some more arguments, which it must refuse; the message."""

    def run(*arguments: str) -> str:
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = {"exp": "smoke", "model.path": tiny_folder}
        defaults |= {"run.root": tmp_path / "runs", "run.cache": tmp_path / "cache"}
        code = main([*(f"{key}={value}" for key, value in defaults.items() if key not in given), *arguments])
        captured = capsys.readouterr()
        return check_refusal(code, captured.out, captured.err, tmp_path)

    return run


def really(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "dpo.train", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


# --- keys and values ------------------------------------------------------------------------------------------------


def test_an_unknown_key_ends_the_real_command_with_the_nearest_key(tmp_path: Path) -> None:
    done = really("exp=smoke", f"run.root={tmp_path / 'runs'}", f"run.cache={tmp_path / 'cache'}", "train.learn_rate=1")
    err = check_refusal(done.returncode, done.stdout, done.stderr, tmp_path)
    assert "unknown key train.learn_rate (command line)" in err and "did you mean train.lr?" in err


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.epochs=two", ['train.epochs = "two" (command line)', "a whole number >= 1", "train.epochs=1"]),
        ("train.activation_checkpointing=yes", ["activation_checkpointing", '"yes"', "true or false"]),
        ("loss.beta=-0.1", ["loss.beta = -0.1 (command line)", "a number > 0"]),
        ("pack.tokens=64000000000", ["pack.tokens = 64000000000", "<= 1,048,576"]),
        ("seed=99999999999999999999", ["seed = 99999999999999999999", "<= 1,000,000,000"]),
        ("pack.tokens=100", ["pack.tokens = 100", "a multiple of 64"]),
        ("objective=verdict", ['objective = "verdict"', "verdicts, responses", "did you mean verdicts?"]),
        ("loss.name=sigmod", ['loss.name = "sigmod"', "sigmoid"]),
        ("checkable.subsets=Maths", ["checkable.subsets", "Maths", "Math"]),
        ("exp=smok", ['no experiment "smok"', "did you mean smoke?"]),
        ("lora.rank", ['"lora.rank" (command line)', "key=value"]),
        ("data.test_fraction=0.95", ["data.test_fraction = 0.95", "together they must be < 1"]),
        ("data.test_fraction=0.5", ["data.test_fraction = 0.5", "checkable rows come split", "checkable.test_rows"]),
        ("data.rows=3", ["data.rows=3", "whole groups"]),  # checkable rows come in groups of four
        ("judge.rows=3", ["judge.rows=3", "whole groups"]),
        ("loss.rdpo_alpha=0.5", ["loss.rdpo_alpha = 0.5", "loss sigmoid", "use rdpo"]),
        ("loss.ld_alpha=0.5", ["loss.ld_alpha = 0.5", "answers of unlike length", "set objective=responses"]),
        ("loss.name=rdpo", ['loss.name = "rdpo"', "answers of unlike length", "set objective=responses"]),
        ("run.resume=latest", ["run.resume=latest", "no run folder"]),
        ("model.path=smollm2", ["model.path = 'smollm2'", "smollm2-135m-instruct, tiny-random"]),
        ("reference.path=nowhere", ["reference.path = 'nowhere'", "smollm2-135m-instruct, tiny-random"]),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(
    refused: Refused, argument: str, expected: list[str]
) -> None:
    message = refused(argument)
    assert all(part in message for part in expected), message


def test_lora_targets_must_be_layers_of_the_model(refused: Refused) -> None:
    assert "no linear layer is called 'q_prj'; did you mean 'q_proj'?" in refused("lora.rank=2", "lora.targets=q_prj")


# --- data files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"id": "r1", "subset": ', ["rows.jsonl:3: not a JSON object", '{"id": "r1", "subset": ']),
        (json.dumps({k: v for k, v in row(2).items() if k != "rejected"}), ["rows.jsonl:3: ", "'rejected' is missing"]),
        (json.dumps(row(2, rejected=["It is  3."])), ["rows.jsonl:3: ", "the same answer is chosen and rejected"]),
        (json.dumps(row(2, id="r0")), ["rows.jsonl:3: id 'r0' is also the id at rows.jsonl:1"]),
        (json.dumps(row(2, chosen="half a smile \ud83d")), ["rows.jsonl:3: ", "chosen[0]", "half of a surrogate pair"]),
        (json.dumps(row(2, prompt="\ud800?")), ["rows.jsonl:3: prompt", "half of a surrogate pair"]),
        (json.dumps(row(2, id="\udfff")), ["rows.jsonl:3: id", "half of a surrogate pair"]),
    ],
    ids=["broken JSON", "no rejected", "chosen = rejected", "same id", "surrogate", "surrogate prompt", "surrogate id"],
)
def test_a_bad_row_is_named_by_file_and_line(refused: Refused, tmp_path: Path, text: str, expected: list[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(n) for n in range(8)], line3=text)
    message = refused(f"data.path={path}")
    assert all(part in message for part in expected), message


def test_a_data_file_that_is_missing_or_empty_or_a_folder_is_named(refused: Refused, tmp_path: Path) -> None:
    empty, folder, named_folder = tmp_path / "empty.jsonl", tmp_path / "rows", tmp_path / "rows.jsonl"
    empty.touch()
    folder.mkdir()
    named_folder.mkdir()
    for path, expected in [
        (tmp_path / "none.jsonl", "no such file"),
        (empty, "there are no rows"),
        (folder, "the folder holds no row file"),
        (named_folder, "the folder holds no row file"),
    ]:
        message = refused(f"data.path={path}")
        assert f"data.path={path}: " in message and expected in message


def test_a_file_that_is_no_row_file_is_named(refused: Refused, tmp_path: Path) -> None:
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1 and no more")
    assert "not a readable parquet file" in refused(f"data.path={broken}")
    utf16 = tmp_path / "rows.jsonl"
    utf16.write_text(json.dumps(row(1)), encoding="utf-16")
    assert "rows.jsonl:1: not UTF-8" in refused(f"data.path={utf16}")


@pytest.mark.parametrize("objective", ["verdicts", "responses"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_row_longer_than_the_pack_is_refused_before_anything_is_computed(
    refused: Refused, tmp_path: Path, split: str, objective: str
) -> None:
    # Held-out rows are judged whatever the objective: there this answer fits a pack alone, but not in a judge's prompt.
    answer = "nine " * (500 if split == "train" else 380)
    splits = ["train", "train", "validation", "test"]
    rows = [row(n, split=name) for n, name in enumerate(splits)] + [row(9, split=split, chosen=answer)]
    message = refused(f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}", f"objective={objective}")
    assert "rows.jsonl:5: row 'r9'" in message and "pack.tokens = 2048" in message


def test_given_splits_that_leak_are_refused_and_the_rows_named(refused: Refused, tmp_path: Path) -> None:
    rows = [row(n, split=name) for n, name in enumerate(["train", "train", "validation", "test"])]
    rows.append(row(9, split="test", prompt="WHAT is 0 + 1"))
    message = refused(f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}")
    assert all(part in message for part in ("'r0' (rows.jsonl:1)", "'r9' (rows.jsonl:5)", "prompt", "split"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_column_that_the_loss_would_ignore_is_refused(refused: Refused, tmp_path: Path, split: str) -> None:
    rows = [row(n, split=name) for n, name in enumerate(["train", "train", "validation", "test"])]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, row(9, split=split, margin=0.5)])
    assert "the rows' column margin: is not read by loss ipo" in refused(f"data.path={path}", "loss.name=ipo")


def test_too_few_rows_to_split_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(1), row(2)])
    assert "no row is left for" in refused(f"data.path={path}")


# --- model folders --------------------------------------------------------------------------------------------------


def set_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    fields = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(fields))


def rename_token_a(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"]["AA"] = fields["model"]["vocab"].pop("A")
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "broken config": (lambda f: (f / "config.json").write_text('{\n "a": 1,\n}'), ["config.json:3"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version": 7}'), ["tokenizer.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "only pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pytorch_model.bin", "never opened"],
    ),
    "truncated": (truncate, ["model.safetensors: truncated", "fetch the file again"]),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 5000), ["model.safetensors"]),
    "architecture": (
        lambda f: set_config(f, architectures=["MambaForCausalLM"]),
        ["MambaForCausalLM", "supported: LlamaForCausalLM"],
    ),
    "other shapes": (lambda f: set_config(f, intermediate_size=96), ["wrong shape", "mlp.gate_proj.weight"]),
    "template raises": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('only one turn') }}"),
        ["chat template", "only one turn", "user"],
    ),
    "template drops the user": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }} ..."),
        ["the same in both orders", "shows no user message", "checkable-train-"],
    ),
    "template is broken": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}"),
        ["chat template", "line 1"],
    ),
    "template is empty": (lambda f: (f / "chat_template.jinja").touch(), ["no chat template"]),
    "template writes nothing": (
        lambda f: (f / "chat_template.jinja").write_text("{# none #}"),
        ["chat template", "writes nothing"],
    ),
    "template is no text": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"),
        ["chat_template.jinja", "not UTF-8"],
    ),
    "templates without a name": (
        lambda f: set_config(f, "tokenizer_config.json", chat_template=[{"template": "x"}]),
        ["no chat template"],
    ),
    "endless brackets": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json", "nested"]),
    "no token for a verdict": (rename_token_a, ["tokenizer", "A and B", "one token"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_folder_is_named_with_its_fault(
    refused: Refused, tmp_path: Path, tiny_folder: Path, fault: str
) -> None:
    breaks, expected = BROKEN[fault]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    breaks(folder)
    message = refused(f"model.path={folder}")
    assert all(part in message for part in [str(folder), *expected]), message


def test_a_missing_shard_is_named(refused: Refused, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", sharded=True)
    (tmp_path / "model" / "model-00002-of-00002.safetensors").unlink()
    assert "shard missing" in (message := refused(f"model.path={tmp_path / 'model'}"))
    assert "model-00002-of-00002.safetensors" in message


def test_a_model_that_lacks_embeddings_for_its_tokenizer_is_refused(refused: Refused, tmp_path: Path) -> None:
    small = tmp_path / "model"
    write_tiny_model(small, changes={"vocab_size": 259})
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 259, "content": "<|new|>"})
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(f"model.path={small}")
    assert "260" in message and "vocab_size = 259" in message


def test_a_reference_that_reads_other_tokens_is_refused(refused: Refused, tmp_path: Path, tiny_folder: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(f"reference.path={other}")
    assert f"reference.path={other}" in message and "tokens" in message


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run.root", "run.cache", "reference.store"])
def test_a_folder_that_cannot_be_made_is_named_by_its_key(refused: Refused, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    message = refused(f"{key}={tmp_path / 'file' / 'below'}")
    assert f"{key}={tmp_path / 'file' / 'below'}: " in message and "Not a directory" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refused(f"run.root={tmp_path / 'closed' / 'runs'}")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses even root")
def test_the_real_command_refuses_an_unwritable_root(tmp_path: Path) -> None:
    done = really("exp=smoke", "run.root=/proc/runs", f"run.cache={tmp_path / 'c'}", "judge.blind_control=false")
    assert "run.root=/proc/runs: " in check_refusal(done.returncode, done.stdout, done.stderr, tmp_path)


def test_a_foreign_kernels_package_ends_the_real_command_with_advice(tmp_path: Path) -> None:
    foreign = tmp_path / "site" / "kernels"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(foreign.parent), str(ROOT)])
    done = really("exp=smoke", cwd=tmp_path, PYTHONPATH=path)
    err = check_refusal(done.returncode, done.stdout, done.stderr, tmp_path)
    assert str(foreign) in err and "pip uninstall kernels" in err


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_files_of_windows_editors_are_read_as_any_other(tmp_path: Path, start: bytes, ending: bytes) -> None:
    plain, edited = tmp_path / "plain.jsonl", tmp_path / "edited.jsonl"
    write_rows(plain, [row(n) for n in range(3)])
    edited.write_bytes(start + plain.read_bytes().replace(b"\n", ending))
    assert read_rows(edited) == read_rows(plain)


def test_a_tilde_means_the_home_folder_as_in_a_shell(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"data.path={tmp_path / 'none.jsonl'}: " in refused("data.path=~/none.jsonl")


def test_one_run_says_that_it_is_no_sweep_where_its_rows_are_and_how_it_ended(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(f'extends = "{ROOT}/experiments/smoke.toml"\n[sweep]\nseed = [0, 1]\n')
    places = [f"run.root={tmp_path / 'runs'}", f"run.cache={tmp_path / 'cache'}", f"model.path={tiny_folder}"]
    run = [f"exp={tmp_path / 'mine.toml'}", *places, "train.max_steps=1", "checkable.validation_rows=0"]
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert "mine.toml [sweep] is not run: this is one training; python -m dpo.sweep runs them all" in err
    folder = (tmp_path / "runs" / "mine" / "latest").resolve()
    first, verdict, consistent, last = out.splitlines()
    assert first == f"run: {folder} (32 training, 0 validation, 32 test rows)" and last.startswith("report: ")
    assert verdict.startswith("Order-averaged accuracy ") and consistent.startswith("Consistent accuracy ")
    with monkeypatch.context() as patched:
        patched.setattr(dpo.train, "run", lambda config: None)
        for root, told in (("runs", True), ("mine-sweep/seed=0", False)):  # the second is an arm of its sweep
            assert main([run[0], *run[2:], f"run.root={tmp_path / root}"]) == 0
            assert ("[sweep] is not run" in capsys.readouterr().err) is told
    judged = [*run[:4], "judge.split=test"]
    assert judge.main(judged) == 0 and (tmp_path / "runs" / "mine" / "latest").resolve() == folder
    assert (tmp_path / "runs" / "mine-judge" / "latest" / "results.json").is_file()


def test_a_folder_of_runs_is_told_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "config.json").write_text("{}")
    assert report.main([str(tmp_path)]) == 2
    told = f"{tmp_path / 'config.json'}: is missing, so this is no run folder; {tmp_path / 'latest'} is one"
    assert told in capsys.readouterr().err
