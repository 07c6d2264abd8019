"""dpo/reference.py: what misses, what hits, what a whole command asks of the reference."""

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
from safetensors.torch import load_file
from test_exactness import ALONE, CONFIG, model, random_tree

import dpo.train
from dpo.config import PackConfig
from dpo.inputs import read_inputs
from dpo.logprobs import TreeLogps, score_trees
from dpo.reference import FORWARD, Usage, forward_code, numerics_tag, reference_logps
from dpo.rows import Row, write_rows
from dpo.settings import load_config
from dpo.step import plan_steps
from dpo.store import Values, open_store, parts_of, sound_values
from dpo.trees import Tree
from models.checkpoint import weights_fingerprint
from models.lora import Adapter, add_lora
from models.tiny import write_tiny_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
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


def read_store(folder: Path) -> Values:
    """All sound values."""
    return {key: value for part in parts_of(folder) for key, value in sound_values(part)[0].items()}


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


def test_answers_that_come_again_in_a_later_window_are_scored_and_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.reference.WRITE_EVERY_TREES", 2)
    folder = open_store(tmp_path, "w", tag())
    trees = [*TREES[:2], *TREES[:2], *TREES[:3]]
    assert equal(ask(folder, trees)[0], made_up(trees))
    assert len(parts_of(folder)) == 2 and len(read_store(folder)) == completions(TREES[:3])


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
    "head path": numerics_tag(CPU, torch.float32, CONFIG.pack, {"path": "fused"}),
    "torch": tag() | {"torch": "2.14.0"},
    "machine": tag() | {"device": "another"},
}


@pytest.mark.parametrize("what", NEIGHBOURS)
def test_another_numerics_tag_misses(tmp_path, what):
    assert NEIGHBOURS[what] != tag() and NEIGHBOURS[what].keys() == tag().keys()
    ask(open_store(tmp_path, "w", tag()), TREES)
    assert ask(open_store(tmp_path, "w", NEIGHBOURS[what]), TREES)[1].misses == completions(TREES)
    assert ask(open_store(tmp_path, "w", tag()), TREES, forbidden)[1].misses == 0


def test_other_code_of_the_forward_is_another_tag_and_a_comment_is_not(tmp_path):
    for package in ("dpo", "models", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    seen = {forward_code(ROOT)}
    for change, new in (("# a remark\n", 0), ("EXTRA = 1\n", 1)):
        for file in ("models/rope.py", "models/families/qwen.py", "kernels/linear_paths.py"):
            with open(tmp_path / file, "a") as handle:
                handle.write(change)
            forward_code.cache_clear()
            before = len(seen)
            seen.add(forward_code(tmp_path))
            assert len(seen) == before + new, (change, file)
    assert tag()["code"] == forward_code(ROOT)


def test_all_modules_that_a_decoder_needs_are_of_the_tag_or_known_to_change_no_bits():
    harmless = {  # how a path is chosen (the path is in the tag), what is no forward, and what reads no weights
        *("kernels/backend.py", "kernels/log_softmax.py", "kernels/preference_loss.py"),
        *("models/errors.py", "models/files.py"),
    }
    code = "import sys, models.decoder, models.lora, models.generate; print(*(m.__file__ for m in sys.modules.values() "
    code += "if m.__name__.startswith(('models.', 'kernels.'))), sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = {str(Path(file).relative_to(ROOT)) for file in ran.stdout.split()}
    named = {str(path.relative_to(ROOT)) for pattern in FORWARD for path in ROOT.glob(pattern)}
    assert len(needed) > 15 and needed - named - harmless == set()


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

    def noted(decoder, trees, pack, ranks, label, note):
        forwards.append((label, len(trees)))
        return score_trees(decoder, trees, pack, ranks, label, note)

    monkeypatch.setattr("dpo.train.score_trees", noted)
    write_small_rows(tmp_path / "rows.jsonl")
    yield Runs(tmp_path, forwards)
    torch.set_flush_denormal(False)


def test_another_beta_rate_seed_loss_name_or_adapter_runs_no_reference_forward(runs):
    results = runs.results()
    assert results["reference"]["misses"] > 0 and runs.reference_forwards() > 0
    asked = sum(results["reference"].values())
    write_tiny_model(runs.folder / "base")  # the policy's own weights in another place
    (runs.folder / "other.toml").write_text(
        f'extends = "{Path(dpo.train.__file__).parents[1]}/experiments/smoke.toml"\n'
    )
    for settings, exp in (
        (("loss.beta=0.7", "train.lr=3e-4", "seed=11"), "smoke"),
        (("loss.label_smoothing=0.2", "loss.rpo_alpha=0.5", "train.batch_pairs=3"), str(runs.folder / "other.toml")),
        (("loss.mix=sft:0.1,nca_pair:2", "loss.wpo=true", "loss.swap_consistency=0.1"), "smoke"),
        (("lora.rank=4", "seed=3", "train.schedule=cosine", "loss.name=ipo", "loss.divergence=js"), "smoke"),
        (("lora.rank=2", f"reference.path={runs.folder / 'base'}"), "smoke"),  # an adapter on the reference, by name
        (("loss.reference_free=true",), "smoke"),
    ):
        results = runs.results(*settings, exp=exp)
        assert results["reference"]["misses"] == 0, settings
        assert runs.reference_forwards() == 0, settings
        assert results["step0_max_difference"] == 0
        assert results["reference"]["hits"] == asked or "loss.reference_free=true" in settings


def test_the_sums_of_tails_that_ld_dpo_takes_run_no_reference_forward(runs):
    asked = runs.results("objective=responses")["reference"]["misses"]
    assert asked > 0 and runs.reference_forwards() > 0
    results = runs.results("objective=responses", "loss.ld_alpha=0.5")
    assert results["reference"]["misses"] == runs.reference_forwards() == results["step0_max_difference"] == 0


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
    assert again["reference"]["misses"] > 0 and again["step0_max_difference"] == 0
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
    trees = [inputs.train_trees[i] for i in plan_steps(inputs.train_trees.column("pairs"), config)[0]]
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
