"""dpo/distributed.py: torchrun over gloo ends where one process ends, however unevenly the ranks are filled."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved import saved_tensors
from test_reference import Runs, write_small_rows

import dpo.train
from dpo.inputs import read_inputs
from dpo.results import read_metrics
from dpo.settings import load_config
from dpo.step import plan_steps
from models.tiny import write_tiny_model

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-9  # what the issue asks of fp64: sums in another order, through AdamW's division by small moments
OF_THE_MACHINE = ("time_s", "tokens_per_s", "peak_rss_mib", "reference")
SETTINGS = ("dtype=fp64", "train.max_steps=0", "train.batch_pairs=5", "train.eval_every_steps=2", "train.select=loss")


@pytest.fixture
def runs(tmp_path):
    """12 rows of 1 to 3 pairs: a step's rows, and with them the pairs, never divide evenly among all ranks."""
    write_small_rows(tmp_path / "rows.jsonl")
    yield Runs(tmp_path, [])
    torch.set_flush_denormal(False)


def torchrun(processes: int, argv: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m", "dpo.train"]
    process = subprocess.Popen(
        [sys.executable, *launch, *argv],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_folder(runs: Runs, root: str) -> Path:
    return (runs.folder / root / "smoke" / "latest").resolve()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(folder / "checkpoints" / "best")


def close(one: object, many: object, path: str) -> None:
    """Equal values, numbers to TOLERANCE; what depends on the machine's speed apart."""
    assert type(one) is type(many), path
    if isinstance(one, dict) and isinstance(many, dict):
        assert one.keys() == many.keys(), path
        for key in one.keys() - set(OF_THE_MACHINE):
            close(one[key], many[key], f"{path}.{key}")
    elif isinstance(one, list) and isinstance(many, list):
        assert len(one) == len(many), path
        for i, (a, b) in enumerate(zip(one, many, strict=True)):
            close(a, b, f"{path}[{i}]")
    elif isinstance(one, float) and isinstance(many, float):
        assert abs(one - many) <= TOLERANCE * max(1.0, abs(one)), f"{path}: {one} and {many}"
    else:
        assert one == many, path


def check_same_end(runs: Runs, processes: int, *settings: str) -> None:
    argv = runs.argv(*SETTINGS, *settings)
    config = load_config(argv)
    trees = read_inputs(config, "cpu").train_trees
    shares = [
        [sum(len(trees[i].pairs) for i in step[r::processes]) for r in range(processes)]
        for step in plan_steps(trees.column("pairs"), config)
    ]
    assert any(len(set(share)) > 1 for share in shares) and any(0 in share for share in shares)  # uneven, and idle

    assert dpo.train.main(runs.argv(*SETTINGS, *settings, f"run.root={runs.folder / 'one'}")) == 0
    stores = [f"run.root={runs.folder / 'many'}", f"reference.store={runs.folder / 'many-store'}"]
    ended = torchrun(processes, runs.argv(*SETTINGS, *settings, *stores))
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("report: ") == 1  # one process writes
    one, many = run_folder(runs, "one"), run_folder(runs, "many")
    assert len(list((runs.folder / "many" / "smoke").iterdir())) == 2  # the run and `latest`

    results = [json.loads((folder / "results.json").read_text()) for folder in (one, many)]
    close(*results, "results")
    if not config.reference.path:
        assert results[0]["step0_max_difference"] == results[1]["step0_max_difference"] == 0
    assert results[1]["reference"] == results[0]["reference"] and results[1]["reference"]["misses"] > 0
    for name in ("metrics.jsonl", "verdicts.jsonl"):
        close(*([json.loads(line) for line in (f / name).read_text().splitlines()] for f in (one, many)), name)

    shares = [line["rewards/accuracies"] for line in read_metrics(many / "metrics.jsonl") if "loss" in line]
    if not config.reference.path:  # else no row divides its answers
        assert not set(shares) <= {0.0, 0.5, 1.0}  # of all ranks' pairs, not one process's yes or no

    moved = 0.0
    start = load_file(read_inputs(config, "cpu").model_folder / "model.safetensors")
    assert weights(one).keys() == weights(many).keys()
    for name, tensor in weights(one).items():
        assert tensor.dtype == weights(many)[name].dtype == torch.float64
        assert (tensor - weights(many)[name]).abs().max() <= TOLERANCE, name
        moved = max(moved, float((tensor - start[name].double()).abs().max()) if name in start else 1.0)
    assert moved > 1e-4  # the model did train
    exports = [load_file(folder / "export" / "model" / "model.safetensors") for folder in (one, many)]
    assert exports[0].keys() == exports[1].keys() == start.keys()
    for name, tensor in exports[0].items():  # in bf16, where a difference of 1e-9 may tip a rounding
        spacing = torch.finfo(tensor.dtype).eps * tensor.abs().max().double()
        assert (tensor.double() - exports[1][name].double()).abs().max() <= spacing, name
    assert (many / "report.md").exists() and (many / "export" / "adapter").is_dir() == bool(config.lora.rank)


def test_two_ranks_end_where_one_process_ends_with_all_weights_training(runs):
    check_same_end(runs, 2)


def test_two_ranks_end_where_one_process_ends_with_adapters(runs):
    check_same_end(runs, 2, "lora.rank=4", "lora.dora=true", "train.activation_checkpointing=true")


def test_three_ranks_end_where_one_process_ends_and_a_tree_may_take_two_packs(runs):
    """Packs so small that a row's orders do not fit in one: a rank without work runs as many as the fullest."""
    check_same_end(runs, 3, "objective=verdicts", "pack.tokens=320", "train.max_steps=3")


@pytest.mark.long
def test_two_ranks_end_where_one_process_ends_with_experts_and_another_reference(runs):
    for seed, name in enumerate(("policy", "reference")):
        write_tiny_model(runs.folder / name, family="qwen3_moe", seed=seed)
    models = (f"model.path={runs.folder / 'policy'}", f"reference.path={runs.folder / 'reference'}")
    check_same_end(runs, 2, *models, "fsdp.expert_units=2", "objective=responses", "train.batch_pairs=3")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 4])
def test_two_ranks_in_bf16_start_exactly_at_the_reference_and_store_the_bits_of_one_process(runs, rank):
    """What one process stored, two ranks find again."""
    settings = ("dtype=bf16", "train.max_steps=2", f"lora.rank={rank}", *(["lora.dora=true"] if rank else []))
    assert dpo.train.main(runs.argv(*settings)) == 0
    ended = torchrun(2, runs.argv(*settings, f"run.root={runs.folder / 'many'}"))
    assert ended.returncode == 0, ended.stderr[-4000:]
    results = json.loads((run_folder(runs, "many") / "results.json").read_text())
    assert results["reference"]["misses"] == 0 and results["step0_max_difference"] == 0


@pytest.mark.long
def test_a_users_mistake_ends_all_ranks_with_its_message(runs):
    ended = torchrun(2, runs.argv("data.path=nowhere.jsonl"))
    assert ended.returncode != 0 and "error: data.path=nowhere.jsonl" in ended.stderr
    assert not (runs.folder / "runs").exists()
