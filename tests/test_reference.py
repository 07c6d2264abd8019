"""dpo/reference.py: what misses, what hits, what a torn file can do, what a whole command asks of the reference."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exactness import ALONE, CONFIG, model, random_tree

import dpo.train
from dpo.config import PackConfig
from dpo.inputs import read_inputs
from dpo.logprobs import TreeLogps, score_trees
from dpo.reference import Usage, numerics_tag, open_store, read_store, reference_logps
from dpo.rows import Row, write_rows
from dpo.settings import load_config
from dpo.step import plan_steps
from dpo.trees import Tree
from models.checkpoint import weights_fingerprint
from models.lora import Adapter, add_lora
from models.tiny import write_tiny_model

CPU = torch.device("cpu")
TREES = [random_tree(seed) for seed in range(10)]
Score = Callable[[Sequence[Tree]], list[TreeLogps]]


def tag(dtype: torch.dtype = torch.float32, pack: PackConfig = CONFIG.pack) -> dict[str, str]:
    return numerics_tag(CPU, dtype, pack, {"path": "torch"})


def made_up(trees: Sequence[Tree]) -> list[TreeLogps]:
    """A reference that costs nothing: each value follows from the completion's address."""
    return [
        [
            np.frombuffer(tree.key(c) * len(completion.targets), "<u4")[: len(completion.targets)].astype(np.float32)
            for c, completion in enumerate(tree.completions)
        ]
        for tree in trees
    ]


def forbidden(trees: Sequence[Tree]) -> list[TreeLogps]:
    raise AssertionError("a reference forward where the store has every value")


def ask(folder: Path, trees: Sequence[Tree], score: Score = made_up) -> tuple[list[TreeLogps], Usage]:
    usage = Usage()
    return reference_logps(folder, trees, score, ALONE, usage), usage


def equal(a: Sequence[TreeLogps], b: Sequence[TreeLogps]) -> bool:
    flat_a, flat_b = ([value for tree in side for value in tree] for side in (a, b))
    return len(flat_a) == len(flat_b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(flat_a, flat_b, strict=True)
    )


def completions(trees: Sequence[Tree]) -> int:
    return sum(len(tree.completions) for tree in trees)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cached_value_is_the_live_one_bit_for_bit_and_as_wide(tiny_folder, tmp_path, dtype):
    decoder = model(tiny_folder, dtype)

    def live(trees: Sequence[Tree]) -> list[TreeLogps]:
        return score_trees(decoder, trees, CONFIG.pack, ALONE, "reference")

    folder = open_store(tmp_path, "w", tag(dtype))
    first, usage = ask(folder, TREES[:6], live)
    assert usage == Usage(hits=0, misses=completions(TREES[:6]))
    mixed = TREES[::-1]  # some are there, some are not, in another order and other packs
    second, usage = ask(folder, mixed, live)
    assert usage == Usage(hits=completions(TREES[:6]), misses=completions(TREES[6:]))
    assert equal(second, live(mixed)) and equal(first, live(TREES[:6]))
    third, usage = ask(folder, TREES, forbidden)
    assert usage == Usage(hits=completions(TREES), misses=0)
    assert equal(third, live(TREES))
    wide = np.float64 if dtype is torch.float64 else np.float32
    assert {value.dtype for value in read_store(folder).values()} == {np.dtype(wide)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_policy_that_is_an_adapter_on_the_reference_starts_at_the_stored_values(tiny_folder, dtype):
    base, policy = model(tiny_folder, dtype), model(tiny_folder, dtype)
    add_lora(policy, Adapter(4, 8.0), seed=0)
    masters = model(tiny_folder, dtype, trains=True)  # full fine-tuning's start: fp32 weights, the same arithmetic
    values = [score_trees(one, TREES, CONFIG.pack, ALONE, "test") for one in (base, policy, masters)]
    assert equal(values[0], values[1]) and equal(values[0], values[2])


def test_only_what_is_missing_is_computed(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    ask(folder, TREES[:4])
    asked: list[str] = []

    def score(trees: Sequence[Tree]) -> list[TreeLogps]:
        asked.extend(tree.id for tree in trees)
        return made_up(trees)

    values, usage = ask(folder, TREES, score)
    assert asked == [tree.id for tree in TREES[4:]] and usage.misses == completions(TREES[4:])
    assert equal(values, made_up(TREES))


def test_many_parts_are_written_as_the_pass_goes_on(tmp_path, monkeypatch):
    """A killed run keeps what it has scored."""
    monkeypatch.setattr("dpo.reference.WRITE_EVERY_TREES", 3)
    folder = open_store(tmp_path, "w", tag())
    calls = 0

    def dies_at_the_third(trees: Sequence[Tree]) -> list[TreeLogps]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return made_up(trees)

    with pytest.raises(KeyboardInterrupt):
        ask(folder, TREES, dies_at_the_third)
    values, usage = ask(folder, TREES)
    assert usage.hits == completions(TREES[:6]) and equal(values, made_up(TREES))


# --- misses ---------------------------------------------------------------------------------------------------------


def copy_with_a_flipped_bit(folder: Path, target: Path, byte: int, bit: int) -> Path:
    shutil.copytree(folder, target)
    data = bytearray((target / "model.safetensors").read_bytes())
    data[byte] ^= 1 << bit
    (target / "model.safetensors").write_bytes(data)
    return target


@pytest.mark.parametrize("memo", [False, True], ids=["hashed", "memo"])
@pytest.mark.parametrize(("byte", "bit"), [(-1, 0), (-20000, 7)])
def test_one_changed_bit_of_the_weights_misses(tiny_folder, tmp_path, byte, bit, memo):
    notes = tmp_path / "memo.json" if memo else None
    changed = copy_with_a_flipped_bit(tiny_folder, tmp_path / "changed", byte, bit)
    same = copy_with_a_flipped_bit(changed, tmp_path / "same", byte, bit)  # and back
    ask(open_store(tmp_path, weights_fingerprint(tiny_folder, notes), tag()), TREES)
    for folder, misses in ((changed, completions(TREES)), (same, 0)):
        assert ask(open_store(tmp_path, weights_fingerprint(folder, notes), tag()), TREES)[1].misses == misses


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_changed_constant_of_the_forward_misses(tiny_folder, tmp_path, key):
    changed = tmp_path / "changed"
    shutil.copytree(tiny_folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {key: config[key] * 2}))
    assert weights_fingerprint(changed) != weights_fingerprint(tiny_folder)


NEIGHBOURS = {
    "dtype": tag(torch.bfloat16),
    "pack size": tag(pack=PackConfig(tokens=512, head_chunk=CONFIG.pack.head_chunk)),
    "head chunk": tag(pack=PackConfig(tokens=CONFIG.pack.tokens, head_chunk=8)),
    "torch": tag() | {"torch": "2.14.0"},
    "machine": tag() | {"device": "another"},
}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_another_numerics_tag_misses(tmp_path, what):
    assert NEIGHBOURS[what] != tag()
    ask(open_store(tmp_path, "w", tag()), TREES)
    assert ask(open_store(tmp_path, "w", NEIGHBOURS[what]), TREES)[1].misses == completions(TREES)
    assert ask(open_store(tmp_path, "w", tag()), TREES, forbidden)[1].misses == 0


def test_another_number_of_threads_misses(tmp_path):
    threads = torch.get_num_threads()
    ask(open_store(tmp_path, "w", tag()), TREES)
    try:
        torch.set_num_threads(threads + 1)
        assert ask(open_store(tmp_path, "w", tag()), TREES)[1].misses == completions(TREES)
    finally:
        torch.set_num_threads(threads)


def test_another_token_and_another_span_miss_alone(tmp_path):
    tree = TREES[0]
    first = tree.completions[0]
    other_target = dataclasses.replace(first, targets=(*first.targets[:-1], (first.targets[-1] + 1) % 259))
    shorter = dataclasses.replace(first, targets=first.targets[1:], start=first.start + 1)
    branches = tuple(((*tokens[:-1], tokens[-1] ^ 1) if tokens else (1,)) for tokens in tree.branches)
    everything = len(tree.completions)
    for changed, misses in (
        (dataclasses.replace(tree, prompt=(*tree.prompt[:-1], tree.prompt[-1] ^ 1)), everything),
        (dataclasses.replace(tree, branches=branches), everything),
        (dataclasses.replace(tree, completions=(other_target, *tree.completions[1:])), 1),
        (dataclasses.replace(tree, completions=(shorter, *tree.completions[1:])), 1),
        (dataclasses.replace(tree, id="other", pairs=()), 0),
    ):
        folder = open_store(tmp_path / str(random.random()), "w", tag())
        ask(folder, [tree])
        assert ask(folder, [changed])[1] == Usage(hits=everything - misses, misses=misses)


# --- torn files and many writers ------------------------------------------------------------------------------------


def only_part(folder: Path) -> Path:
    (part,) = folder.glob("part-*.safetensors")
    return part


def test_a_flipped_bit_anywhere_in_a_part_is_never_read_as_another_value(tmp_path):
    """Every byte of a whole small part, header and values."""
    folder = open_store(tmp_path, "w", tag())
    trees = TREES[:1]
    values, _ = ask(folder, trees)
    part, sound = only_part(folder), read_store(folder)
    data, draw, harmless = part.read_bytes(), random.Random(0), 0
    for position in range(len(data)):
        torn = bytearray(data)
        torn[position] ^= 1 << draw.randrange(8)
        part.write_bytes(torn)
        read = read_store(folder)
        if read:  # a bit of no meaning, such as a blank of the header's padding
            harmless += 1
            assert list(read) == list(sound) and all(map(np.array_equal, read.values(), sound.values()))
    assert harmless < 0.1 * len(data)
    part.write_bytes(torn)
    again, usage = ask(folder, trees)
    assert usage.misses == completions(trees) and equal(again, values)
    assert ask(folder, trees, forbidden)[1].misses == 0  # computed again, and kept


def test_a_truncated_part_is_passed_over_wherever_it_ends(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    trees = TREES[:1]
    values, _ = ask(folder, trees)
    part = only_part(folder)
    data = part.read_bytes()
    for length in range(len(data)):
        part.write_bytes(data[:length])
        assert read_store(folder) == {}
    part.write_bytes(data + b"\0")
    assert read_store(folder) == {}
    again, usage = ask(folder, trees)
    assert usage.misses == completions(trees) and equal(again, values)


def test_one_torn_part_does_not_take_the_others_with_it(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    ask(folder, TREES[:5])
    part = only_part(folder)
    ask(folder, TREES[5:])
    part.write_bytes(part.read_bytes()[:-7])
    values, usage = ask(folder, TREES)
    assert usage == Usage(hits=completions(TREES[5:]), misses=completions(TREES[:5])) and equal(values, made_up(TREES))


def test_a_file_of_another_kind_among_the_parts_is_passed_over(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    save_file({"keys": torch.zeros(2)}, folder / "part-foreign.safetensors")
    (folder / "part-empty.safetensors").touch()
    (folder / "part-folder.safetensors").mkdir()
    assert equal(ask(folder, TREES)[0], made_up(TREES))


WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "tests")]
import numpy as np
import dpo.reference
from dpo.reference import Usage, reference_logps, write_part
from test_exactness import ALONE, random_tree
from test_reference import made_up

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid

def big_parts():
    draw = random.Random(os.getpid())
    while True:
        numbers = [draw.randrange(10**6) for _ in range(4)]
        write_part(folder, {n.to_bytes(16, "big"): np.full(50_000, n, np.float32) for n in numbers})

def whole_pass():
    dpo.reference.WRITE_EVERY_TREES = 2
    reference_logps(folder, [random_tree(seed) for seed in range(60)], made_up, ALONE, Usage())

folder = Path(sys.argv[3])
if sys.argv[2] == "killed":
    for round in range(15):
        pid = child(big_parts)
        time.sleep(random.Random(round).uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
else:
    for pid in [child(whole_pass) for _ in range(4)]:
        assert os.waitpid(pid, 0)[1] == 0
"""


def run_writers(mode: str, folder: Path) -> None:
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", WRITERS, str(root), mode, str(folder)], check=True, timeout=120)


def test_a_writer_killed_at_any_moment_leaves_no_torn_value(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    run_writers("killed", folder)
    values = read_store(folder)
    assert len(values) > 15
    for key, value in values.items():
        assert value.shape == (50_000,) and bool((value == int.from_bytes(key, "big")).all())
    assert len(list(folder.glob("part-*"))) * 4 >= len(values)  # what was cut off lies under no part's name


def test_processes_that_fill_a_store_at_once_leave_it_whole(tmp_path):
    folder = open_store(tmp_path, "w", tag())
    run_writers("together", folder)
    trees = [random_tree(seed) for seed in range(60)]
    values, usage = ask(folder, trees, forbidden)
    assert usage.misses == 0 and equal(values, made_up(trees))
    assert len(list(folder.glob("part-*"))) > 30  # they did write at once: no one found all of another's


# --- the whole command ----------------------------------------------------------------------------------------------


def write_small_rows(path: Path, *, train: int = 12, validation: int = 4, test: int = 6) -> None:
    """Short rows with given splits, of one to three wrong answers: another seed changes none of them."""
    rows = []
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        for i in range(count):
            prompt = (
                {"role": "user", "content": f"Say {split} {'abcdefghijklmnopqrstuvwxyz'[i % 26] * (1 + i // 26)}"},
            )
            rejected = tuple(f"no {n}{'!' * (i % 3)}" for n in range(1 + i % 3))
            rows.append(Row(f"{split}-{i}", f"kind {i % 2}", prompt, (f"yes {i}",), rejected, f"{split}-{i}", split))
    write_rows(path, rows)


@dataclasses.dataclass
class Runs:
    """Whole commands on the same rows and one store, with every forward over trees noted."""

    folder: Path
    forwards: list[tuple[str, int]]

    def argv(self, *settings: str, exp: str = "smoke") -> list[str]:
        defaults = {
            "run.root": str(self.folder / "runs"),
            "run.cache": str(self.folder / "cache"),
            "data.path": str(self.folder / "rows.jsonl"),
            "device": "cpu",
            "pack.tokens": "512",
            "log.plots": "false",
            "train.max_steps": "2",
        }
        defaults |= dict(setting.split("=", 1) for setting in settings)
        return [f"exp={exp}", *(f"{key}={value}" for key, value in defaults.items())]

    def results(self, *settings: str, exp: str = "smoke") -> dict:
        self.forwards.clear()
        assert dpo.train.main(self.argv(*settings, exp=exp)) == 0
        return json.loads((self.folder / "runs" / Path(exp).stem / "latest" / "results.json").read_text())

    def reference_forwards(self) -> int:
        """Trees that the reference (or the untrained judge, which is the same weights) was run on."""
        return sum(trees for label, trees in self.forwards if label in ("reference", "judging base"))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    forwards: list[tuple[str, int]] = []

    def noted(decoder, trees, pack, ranks, label):
        forwards.append((label, len(trees)))
        return score_trees(decoder, trees, pack, ranks, label)

    monkeypatch.setattr("dpo.train.score_trees", noted)
    write_small_rows(tmp_path / "rows.jsonl")
    yield Runs(tmp_path, forwards)
    torch.set_flush_denormal(False)


def test_another_beta_rate_seed_loss_name_or_adapter_runs_no_reference_forward(runs):
    results = runs.results()
    assert results["reference"]["misses"] > 0 and runs.reference_forwards() > 0
    asked = sum(results["reference"].values())
    (runs.folder / "other.toml").write_text(
        f'extends = "{Path(dpo.train.__file__).parents[1]}/experiments/smoke.toml"\n'
    )
    for settings, exp in (
        (("loss.beta=0.7", "train.lr=3e-4", "seed=11"), "smoke"),
        (("loss.label_smoothing=0.2", "loss.rpo_alpha=0.5", "train.batch_pairs=3"), str(runs.folder / "other.toml")),
        (("loss.ld_alpha=0.5", "loss.mix=sft:0.1,nca_pair:2", "loss.wpo=true", "loss.swap_consistency=0.1"), "smoke"),
        (("lora.rank=4", "seed=3", "train.schedule=cosine", "loss.name=ipo", "loss.divergence=js"), "smoke"),
        (("loss.reference_free=true",), "smoke"),
    ):
        results = runs.results(*settings, exp=exp)
        assert results["reference"]["misses"] == 0, settings
        assert runs.reference_forwards() == 0, settings
        assert results["step0_max_difference"] == 0
        assert results["reference"]["hits"] == asked or "loss.reference_free=true" in settings


@pytest.mark.parametrize(
    "settings", [("dtype=bf16",), ("pack.tokens=1024",), ("pack.head_chunk=64",), ("objective=responses",)], ids=str
)
def test_another_dtype_pack_or_objective_runs_the_reference_again(runs, settings):
    runs.results("dtype=fp32")
    results = runs.results(*(("dtype=fp32", *settings) if settings[0] != "dtype=bf16" else settings))
    assert results["reference"]["misses"] > 0 and runs.reference_forwards() > 0


def test_a_run_in_fp64_stores_fp64_and_one_in_bf16_fp32(runs):
    for dtype, wide in (("fp64", torch.float64), ("bf16", torch.float32)):
        runs.results(f"dtype={dtype}", f"reference.store={runs.folder / dtype}")
        parts = list((runs.folder / dtype).glob("*/part-*.safetensors"))
        assert parts and {load_file(part)["logps"].dtype for part in parts} == {wide}


def test_a_store_with_a_torn_part_gives_the_run_of_an_empty_store(runs):
    first = runs.results()
    for part in (runs.folder / "cache" / "reference").glob("*/part-*.safetensors"):
        data = bytearray(part.read_bytes())
        data[-3] ^= 16
        part.write_bytes(data)
    again = runs.results()
    assert again["reference"] == first["reference"] and again["step0_max_difference"] == 0
    assert again["judge"] == first["judge"]


def test_a_reference_of_other_weights_is_used_and_its_step_0_reported_not_checked(runs):
    """The first step's loss is that of the plain formula on both models' own log-probs."""
    other = runs.folder / "other"
    write_tiny_model(other, seed=1)
    settings = ("dtype=fp64", f"reference.path={other}")
    results = runs.results(*settings)
    assert runs.reference_forwards() > 0 and results["step0_max_difference"] > 0.01
    config = load_config(runs.argv(*settings))
    inputs = read_inputs(config, "cpu")
    assert weights_fingerprint(inputs.reference_folder) != weights_fingerprint(inputs.model_folder)
    trees = [inputs.train_trees[i] for i in plan_steps(inputs.train_trees, config)[0]]
    policy, reference = (
        score_trees(model(folder, torch.float64), trees, config.pack, ALONE, "test")
        for folder in (inputs.model_folder, other)
    )
    losses, difference = [], 0.0
    for tree, of_policy, of_reference in zip(trees, policy, reference, strict=True):
        ratio = [float(p.sum() - r.sum()) for p, r in zip(of_policy, of_reference, strict=True)]
        difference = max(difference, *map(abs, ratio))
        losses += [np.log1p(np.exp(-0.1 * (ratio[pair.winner] - ratio[pair.loser]))) for pair in tree.pairs]
    tolerance = 1000 * np.finfo(np.float64).eps  # the sums are of some nats, added in another order
    assert abs(results["step0_loss"] - np.mean(losses)) <= tolerance
    assert abs(results["step0_max_difference"] - difference) <= tolerance * 10
    assert runs.results(*settings)["reference"]["misses"] == 0
