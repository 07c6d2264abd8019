"""dpo/train.py: one step against a plain formula, the whole command, what it writes, and that it learns."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved import saved_tensors
from test_exactness import ALONE, CONFIG, model, one_at_a_time, random_tree
from test_reference import Runs, read_store, write_small_rows

import dpo.train
from dpo.config import Config
from dpo.inputs import read_inputs
from dpo.judge.controls import CONTROLS
from dpo.judge.local import answer_verdicts
from dpo.logprobs import score_trees
from dpo.loop import STEP0_TOLERANCE, selection_score
from dpo.losses import pair_losses
from dpo.packing import pack_share
from dpo.pairs import PairLogps, pair_logps, reference_sums
from dpo.policy import load_policy
from dpo.rows import Row, write_rows
from dpo.settings import load_config
from dpo.step import accumulate_gradients, means, plan_steps
from dpo.store import parts_of, write_part
from dpo.trees import Completion, Pair, Tree
from models.decoder import next_token_logits

EPS = torch.finfo(torch.float64).eps
LN_2 = pytest.approx(math.log(2), rel=8 * EPS, abs=0)  # a mean of a few equal values rounds
TREES = [random_tree(seed) for seed in range(8)]


@pytest.fixture
def runs(tmp_path):
    write_small_rows(tmp_path / "rows.jsonl")
    yield Runs(tmp_path, [])
    torch.set_flush_denormal(False)  # a run turns it on for good


def latest(runs: Runs) -> Path:
    return (runs.folder / "runs" / "smoke" / "latest").resolve()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- one step -------------------------------------------------------------------------------------------------------


def shifted_references(folder: Path, seed: int = 0) -> list[torch.Tensor]:
    """Reference sums some nats from the policy's, so that no margin is 0."""
    scored = score_trees(model(folder, torch.float64), TREES, CONFIG.pack, ALONE, "test")
    generator = torch.Generator().manual_seed(seed)
    sums = [reference_sums(logps) for logps in scored]
    return [one + 4 * torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in sums]


@pytest.mark.parametrize(
    "loss",
    [{}, {"beta": 0.7}, {"label_smoothing": 0.2}, {"reference_free": True}, {"rpo_alpha": 0.5}],
    ids=lambda loss: next(iter(loss), "plain"),
)
def test_loss_metrics_and_gradient_of_a_step_are_those_of_plain_sequences_and_a_plain_formula(tiny_folder, loss):
    """fp64; the truth runs one sequence at a time and writes the loss out by hand."""
    config = Config(exp="test", pack=CONFIG.pack.model_dump(), loss=loss)
    references = shifted_references(tiny_folder)
    policy, plain = (model(tiny_folder, torch.float64, trains=True) for _ in range(2))
    sums = accumulate_gradients(policy, TREES, references, config, ALONE)
    figures = means(sums)

    beta, smoothing, alpha = config.loss.beta, config.loss.label_smoothing, config.loss.rpo_alpha
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    expected = dict.fromkeys(("chosen", "rejected", "accuracies", "logps"), 0.0)
    for tree, reference_S in zip(TREES, references, strict=True):
        logps = one_at_a_time(plain, tree)
        reference_S = torch.zeros_like(reference_S) if config.loss.reference_free else reference_S
        for pair in tree.pairs:
            w, l = ((logps[i] - reference_S[i]) for i in (pair.winner, pair.loser))  # noqa: E741
            right = 1 / (1 + torch.exp(-beta * (w - l)))
            nll = -logps[pair.winner] / len(tree.completions[pair.winner].targets)
            one = -(1 - smoothing) * right.log() - smoothing * (1 - right).log() + alpha * nll
            total, weight = total + pair.weight * one, weight + pair.weight
            expected["chosen"] += pair.weight * beta * w.item()
            expected["rejected"] += pair.weight * beta * l.item()
            expected["accuracies"] += pair.weight * float(w > l)
            expected["logps"] += pair.weight * logps[pair.winner].item()
    (total / weight).backward()
    scale = max(abs(float(sum_)) for sum_ in torch.cat(references))
    tolerance = 1000 * EPS * scale  # sums over some hundred tokens and 2 layers, in another order
    assert abs(figures["loss"] - total.item() / weight) <= tolerance
    for name in ("chosen", "rejected", "accuracies"):
        assert abs(figures[f"rewards/{name}"] - expected[name] / weight) <= tolerance, name
    assert abs(figures["rewards/margins"] - (figures["rewards/chosen"] - figures["rewards/rejected"])) <= tolerance
    assert abs(figures["logps/chosen"] - expected["logps"] / weight) <= tolerance
    assert sums["tokens"] == sum(tree.tokens for tree in TREES)
    gradient, exact = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (policy, plain))
    assert (gradient - exact).norm() <= 1000 * EPS * exact.norm()


def test_a_row_with_half_the_weight_counts_half(tiny_folder):
    """Weights divide out of the mean: all halved change nothing, one halved moves the mean by the formula."""
    references = shifted_references(tiny_folder)
    config = Config(exp="test", pack=CONFIG.pack.model_dump())

    def losses(trees: list[Tree]) -> tuple[float, float]:
        sums = accumulate_gradients(model(tiny_folder, torch.float64, trains=True), trees, references, config, ALONE)
        return means(sums)["loss"], sums["weight"]

    def weigh(tree: Tree, factor: float) -> Tree:
        pairs = tuple(type(pair)(pair.winner, pair.loser, pair.weight * factor) for pair in tree.pairs)
        return Tree(tree.id, tree.prompt, tree.branches, tree.completions, pairs)

    whole, weight = losses(TREES)
    assert losses([weigh(tree, 0.5) for tree in TREES]) == (pytest.approx(whole, rel=8 * EPS), weight / 2)
    first = sum(pair.weight for pair in TREES[0].pairs)
    without = losses([weigh(TREES[0], 2.0**-40), *TREES[1:]])[0]
    half = losses([weigh(TREES[0], 0.5), *TREES[1:]])[0]
    rest = weight - first
    alone = (whole * weight - without * rest) / first
    assert half == pytest.approx((alone * first / 2 + without * rest) / (first / 2 + rest), rel=2.0**-36)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activation_checkpointing_gives_the_same_gradient_bits(runs, dtype, rank):
    gradients = []
    for on in ("false", "true"):
        config = load_config(runs.argv(f"dtype={dtype}", f"lora.rank={rank}", f"train.activation_checkpointing={on}"))
        inputs = read_inputs(config, "cpu")
        policy = load_policy(config, inputs.model_folder, inputs.dtype, ALONE)
        assert policy.checkpoint_activations == (on == "true")
        references = [torch.ones(len(tree.completions), dtype=torch.float64) for tree in inputs.train_trees]
        recomputed = 0

        def count(*_: object) -> None:
            nonlocal recomputed
            recomputed += 1

        policy.model.layers[0].register_forward_pre_hook(count)
        accumulate_gradients(policy, inputs.train_trees[:4], references, config, ALONE)
        gradients.append(({n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, recomputed))
    (kept, once), (recomputed_grads, twice) = gradients
    assert twice == 2 * once  # it did run every layer again
    assert kept.keys() == recomputed_grads.keys() and any(grad.any() for grad in kept.values())
    assert all(torch.equal(kept[name], recomputed_grads[name]) for name in kept)


@pytest.mark.parametrize("fault", [float("nan"), 1e-3])
def test_a_nan_counts_as_a_difference_between_policy_and_reference(tiny_folder, fault):
    decoder = model(tiny_folder, torch.float64, trains=True)
    scored = score_trees(decoder, TREES, CONFIG.pack, ALONE, "test")
    for place in (0, 3, len(TREES) - 1):
        references = [reference_sums(logps) for logps in scored]
        assert accumulate_gradients(decoder, TREES, references, CONFIG, ALONE)["difference"] <= STEP0_TOLERANCE
        references[place][0] += fault
        assert not accumulate_gradients(decoder, TREES, references, CONFIG, ALONE)["difference"] <= STEP0_TOLERANCE


# --- the whole command ----------------------------------------------------------------------------------------------

NUMBERS = (int, float)
JUDGE = {"n": int, "wins": int, "losses": int, "ties": int, "invalid": int, "accuracy": NUMBERS}
JUDGE |= {"accuracy_interval": list, "averaged_accuracy": NUMBERS, "averaged_interval": list}
JUDGE |= {"position_consistency": NUMBERS, "raw_a_rate": NUMBERS}
TEST = {"p": NUMBERS, "difference": NUMBERS, "interval": list}
RESULTS = {
    "step0_loss": float,
    "step0_max_difference": float,
    "reference": {"hits": int, "misses": int},
    "judge": {
        "base": JUDGE | {"subsets": dict},
        "trained": JUDGE | {"subsets": dict},
        "controls": dict,
        "comparison": {"consistent": TEST, "averaged": TEST},
        "conclusion": str,
    },
    "train": {
        "steps": int,
        "pairs": int,
        "tokens": int,
        "time_s": float,
        "tokens_per_s": float,
        "peak_rss_mib": NUMBERS,
    },
    "time_s": dict,
    "data": dict,
}
STEP_METRICS = {"step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
STEP_METRICS |= {"logps/chosen", "logps/rejected", "lr", "grad_norm", "tokens_per_s", "time_s"}
EVAL_METRICS = {"eval/loss", "eval/rewards/margins", "eval/accuracy", "eval/averaged_accuracy", "eval/raw_a_rate"}


def check(value: object, wanted: object, path: str) -> None:
    """`value` has at least the keys of `wanted`, of those types, and finite numbers only."""
    if isinstance(wanted, dict):
        assert isinstance(value, dict), path
        for key, inner in wanted.items():
            assert key in value, f"{path}.{key}"
            check(value[key], inner, f"{path}.{key}")
    else:
        assert isinstance(value, wanted) and not isinstance(value, bool), f"{path} is {value!r}"
        assert not isinstance(value, float) or math.isfinite(value), path


def test_results_json_has_every_named_key_with_its_type(runs):
    results = runs.results()
    check(results, RESULTS, "results")
    assert results["step0_loss"] == LN_2 and results["step0_max_difference"] == 0
    for judge in (results["judge"]["base"], results["judge"]["trained"]):
        for figures in (judge, *judge["subsets"].values()):
            check(figures, JUDGE, "judge")
            assert figures["wins"] + figures["losses"] + figures["ties"] + figures["invalid"] == figures["n"]
            assert figures["accuracy"] == pytest.approx(figures["wins"] / figures["n"], rel=EPS, abs=0)
            for name in ("accuracy", "averaged"):
                low, high = figures[f"{name}_interval"]
                assert 0 <= low <= figures["accuracy" if name == "accuracy" else "averaged_accuracy"] <= high <= 1
        assert set(judge["subsets"]) == {"kind 0", "kind 1"}
        assert sum(figures["n"] for figures in judge["subsets"].values()) == judge["n"] == 6
    for name, control in results["judge"]["controls"].items():
        check(control, {"accuracy": NUMBERS, "averaged_accuracy": NUMBERS, "averaged": TEST, "consistent": TEST}, name)
    assert any(name.startswith("blind") for name in results["judge"]["controls"])
    worse = [name for name in results["judge"]["controls"] if name in results["judge"]["conclusion"]]
    assert results["judge"]["conclusion"] == "better than all controls" or worse
    assert results["data"]["rows"] == {"train": 12, "validation": 4, "test": 6}


def test_the_run_folder_is_complete_and_every_line_of_its_metrics_has_its_figures(runs):
    runs.results("train.max_steps=0", "train.batch_pairs=8", "train.epochs=2", "train.eval_every_steps=2")
    folder = latest(runs)
    for name in ("config.json", "env.json", "results.json", "verdicts.jsonl", "report.md", "checkpoints", "export"):
        assert (folder / name).exists(), name
    assert Config(**json.loads((folder / "config.json").read_text())) == load_config(
        runs.argv("train.max_steps=0", "train.batch_pairs=8", "train.epochs=2", "train.eval_every_steps=2")
    )
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)) and len(steps) > 4
    assert all(set(line) >= STEP_METRICS for line in steps) and all(set(line) >= EVAL_METRICS for line in evals)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line["step"] for line in evals] == sorted({*range(2, len(steps) + 1, 2), len(steps)})
    assert steps[-1]["epoch"] == 2.0
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert {(v["judge"], v["id"]) for v in verdicts} == {
        (judge, f"test-{i}") for judge in ("base", "trained", *CONTROLS) for i in range(6)
    }
    assert [tuple(v["pair"]) for v in verdicts] == [(0, 0)] * 6 * (2 + len(CONTROLS))


def test_recorded_epochs_pairs_and_tokens_are_those_of_the_rows_taken(runs):
    """Cut short by max_steps, an epoch is not called whole."""
    results = runs.results("train.max_steps=2", "train.batch_pairs=8", "objective=responses")
    config = load_config(runs.argv("train.max_steps=2", "train.batch_pairs=8", "objective=responses"))
    trees = read_inputs(config, "cpu").train_trees
    taken = [index for step in plan_steps(trees.column("pairs"), config) for index in step]
    pairs = sum(len(trees[index].pairs) for index in taken)
    assert results["train"]["steps"] == 2 and results["train"]["pairs"] == pairs
    assert results["train"]["tokens"] == sum(trees[index].tokens for index in taken)
    last = [line for line in metrics(latest(runs)) if "epoch" in line][-1]
    assert last["epoch"] == pairs / sum(len(tree.pairs) for tree in trees) < 1


def test_two_runs_of_one_configuration_end_in_the_same_bits(runs):
    """The second one with its reference from the store."""
    weights, figures = [], []
    for settings in ((), (), ("train.lr=2e-3",)):
        runs.results("dtype=bf16", "train.max_steps=3", *settings)
        folder = latest(runs)
        best = saved_tensors(folder / "checkpoints" / "best")
        weights.append({name: tensor.numpy().tobytes() for name, tensor in best.items()})
        lines = metrics(folder)
        figures.append([{k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")} for line in lines])
    assert weights[0] == weights[1] != weights[2]
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.parametrize("settings", [["objective=responses"], ["objective=responses", "lora.rank=4"], ["lora.rank=4"]])
def test_each_objective_runs_with_all_weights_and_with_adapters(runs, settings):
    results = runs.results(*settings)
    assert results["step0_loss"] == LN_2 and results["step0_max_difference"] == 0
    assert results["judge"]["trained"]["n"] == 6
    assert (latest(runs) / "export" / "adapter").is_dir() == ("lora.rank=4" in settings)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_export_opens_in_transformers_and_judges_as_the_run_did(runs, rank):
    """Weights are the trained ones in the model's published dtype; logits then equal ours as exactly as theirs do."""
    transformers = pytest.importorskip("transformers")
    runs.results(f"lora.rank={rank}", "dtype=fp32", "train.select=last", "train.lr=1e-2")
    folder = latest(runs)
    exported = load_file(folder / "export" / "model" / "model.safetensors")
    config = load_config(runs.argv("dtype=fp32"))
    start = load_file(read_inputs(config, "cpu").model_folder / "model.safetensors")
    trained = saved_tensors(folder / "checkpoints" / "best")
    assert exported.keys() == start.keys()
    assert sum(not torch.equal(exported[name], start[name]) for name in start) >= 14  # 7 linears of 2 layers, or more
    for name, tensor in exported.items():
        stem = name.removesuffix(".weight")
        expected = trained.get(name, start[name].float())
        if f"{stem}.lora.A" in trained:
            expected = expected + 2.0 * (trained[f"{stem}.lora.B"] @ trained[f"{stem}.lora.A"])
        assert torch.equal(tensor, expected.to(start[name].dtype)), name
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder / "export" / "model", dtype=torch.float32)
    tokens = torch.randint(256, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        theirs = opened.eval()(torch.tensor([tokens])).logits[0]
        ours, truth = (
            next_token_logits(model(folder / "export" / "model", dtype), tokens)
            for dtype in (torch.float32, torch.float64)
        )
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm()
    assert (theirs.double() - truth).norm() <= 64 * torch.finfo(torch.float32).eps * truth.norm()


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_a_stored_reference_that_does_not_fit_stops_the_run_at_step_0(runs, capsys, error):
    """A sound part with wrong values: what a checksum cannot see."""
    runs.results()
    (store,) = (runs.folder / "cache" / "reference").iterdir()
    values = read_store(store)
    for part in parts_of(store):
        part.unlink()
    write_part(store, {key: value + np.float32(error) for key, value in values.items()})
    capsys.readouterr()
    assert dpo.train.main(runs.argv()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: step 0: ") and "reference.store" in said and "Traceback" not in said
    assert not (latest(runs) / "results.json").exists() and not (latest(runs) / "export").exists()
    assert dpo.train.main(runs.argv(f"reference.store={runs.folder / 'new'}")) == 0  # the advice works
    shutil.rmtree(store)


def test_a_machine_that_computes_one_thing_twice_differently_is_told_from_a_store_that_does_not_fit(
    runs, capsys, monkeypatch
):
    def off(*given, **named):
        return accumulate_gradients(*given, **named) | {"difference": 0.003}

    monkeypatch.setattr("dpo.loop.accumulate_gradients", off)
    assert dpo.train.main(runs.argv()) == 2
    said = capsys.readouterr().err
    assert "computed once more by 0.00e+00" in said and "two answers" in said and "reference.store" not in said


# --- learning, and picking the best ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("objective", ["responses", "verdicts"])
def test_a_task_that_is_easy_to_learn_is_learnt(tmp_path, objective, rank):
    """The right answer holds a marker: on unseen rows too every margin becomes positive, every verdict right."""
    names = [f"{a}{b}" for a in "bdfgklm" for b in "aeiouy"]
    splits = ["train"] * 30 + ["validation"] * 6 + ["test"] * 6
    rows = [
        Row(name, "marker", ({"role": "user", "content": name},), (f"{name} ###",), (f"{name} ...",), name, split)
        for name, split in zip(names, splits, strict=True)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    runs = Runs(tmp_path, [])
    results = runs.results(
        f"objective={objective}",
        f"lora.rank={rank}",
        "dtype=fp32",
        "train.max_steps=0",
        "train.epochs=10",
        "train.batch_pairs=10",
        f"train.lr={LEARNING_RATE[objective]}",
        "train.schedule=constant",
        "judge.rewards=mean",
    )
    lines = metrics(latest(runs))
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["rewards/accuracies"] == 0.5
    assert [line["rewards/accuracies"] for line in steps[-3:]] == [1.0] * 3
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    (last,) = [line for line in lines if "eval/loss" in line]
    assert last["eval/rewards/accuracies"] == 1.0
    if objective == "verdicts":
        assert results["judge"]["base"]["accuracy"] == 0 and results["judge"]["trained"]["accuracy"] == 1
        assert results["judge"]["trained"]["averaged_accuracy"] == 1
    else:
        assert results["judge"]["rewards"]["accuracy"] == 1
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("mean", "lead"), [(False, -0.5), (True, 0.25)])
def test_an_implicit_reward_is_the_log_ratio_of_policy_and_reference_summed_or_a_token(mean, lead):
    """Chosen: -1 against -2 in one token; rejected: -3.5 against -5 in two."""
    row = Row("a", "s", ({"role": "user", "content": "?"},), ("x",), ("y",), "g")
    completions = (Completion(0, 0, (1,)), Completion(1, 0, (2, 3)))
    tree = Tree("a", (1,), ((), (2,)), completions, (Pair(0, 1, 1.0),))
    scored = [[np.array([-1.0]), np.array([-1.5, -2.0])]]
    base = [[np.array([-2.0]), np.array([-2.0, -3.0])]]
    found = answer_verdicts([row], [tree], scored, base, mean=mean)
    (verdict,) = found["rewards"]
    assert (verdict.pair, verdict.first, verdict.second) == ((0, 0), lead, -lead)
    likelihoods = (0.75, 0.5) if mean else (2.5, 3.0)
    assert tuple(found[name][0].first for name in ("likelihood", "base likelihood")) == likelihoods


LEARNING_RATE = {"responses": 1e-2, "verdicts": 1e-2}


def test_the_weights_of_the_best_validation_are_the_ones_judged_and_exported(runs):
    """A rate that ruins the model: its loss is lowest early, and that model is kept."""
    settings = ("train.max_steps=6", "train.eval_every_steps=1", "train.lr=0.05", "train.select=loss", "dtype=fp32")
    results = runs.results(*settings)
    losses = [line["eval/loss"] for line in metrics(latest(runs)) if "eval/loss" in line]
    best = losses.index(min(losses)) + 1
    assert best < len(losses) == 6 and results["train"]["best_step"] == best
    exported = load_file(latest(runs) / "export" / "model" / "model.safetensors")
    kept = saved_tensors(latest(runs) / "checkpoints" / "best")
    assert all(torch.equal(exported[name], kept[name].to(exported[name].dtype)) for name in exported)
    last = runs.results(*settings[:3], "train.select=last", "dtype=fp32")
    assert last["train"]["best_step"] == 6
    ruined = load_file(latest(runs) / "export" / "model" / "model.safetensors")
    assert not torch.equal(ruined["model.norm.weight"], exported["model.norm.weight"])


def test_the_chosen_figure_picks_and_the_loss_breaks_ties():
    def score(select: str, step: int, accuracy: float, loss: float) -> list[float]:
        figures = {"eval/averaged_accuracy": accuracy, "eval/accuracy": 1 - accuracy, "eval/loss": loss}
        return selection_score(figures, select, step)

    assert score("averaged_accuracy", 1, 0.7, 0.9) > score("averaged_accuracy", 2, 0.6, 0.1)
    assert score("accuracy", 1, 0.6, 0.9) > score("accuracy", 2, 0.7, 0.1)
    assert score("averaged_accuracy", 1, 0.7, 0.5) > score("averaged_accuracy", 2, 0.7, 0.6)
    assert score("loss", 1, 0.1, 0.5) > score("loss", 2, 0.9, 0.6)
    assert score("last", 2, 0.1, 0.9) > score("last", 1, 0.9, 0.1)
    assert score("loss", 1, 0.5, 0.5) > []


@pytest.mark.parametrize("select", ["averaged_accuracy", "accuracy", "loss", "last"])
def test_without_validation_rows_the_last_weights_are_kept(select):
    assert selection_score({}, select, 2) > selection_score({}, select, 1) > []


def test_a_training_whose_validation_gets_no_better_ends_after_so_many_of_them(runs):
    settings = (
        "train.lr=1e-30",
        "train.max_steps=9",
        "train.batch_pairs=2",
        "train.epochs=9",
        "train.eval_every_steps=1",
    )
    ended = runs.results(*settings, "train.patience=2", "train.checkpoint_every_steps=100")["train"]
    assert (ended["best_step"], ended["steps"]) == (1, 3)
    checkpoints = runs.folder / "runs" / "smoke" / "latest" / "checkpoints"
    assert [one.name for one in checkpoints.glob("step-*")] == ["step-000003"]  # the one at the end


def test_pair_logps_holds_each_pairs_own_two_completions(tiny_folder):
    batch = pack_share(TREES, 256, 0, 1)[0]
    sums_S = torch.arange(len(batch.completions), dtype=torch.float64)
    logps = pair_logps(sums_S, -sums_S, batch)
    assert isinstance(logps, PairLogps) and torch.equal(logps.chosen_B, batch.winner_B.double())
    assert torch.equal(logps.reference_rejected_B, -batch.loser_B.double())
    assert torch.equal(logps.rejected_length_B, batch.lengths_S[batch.loser_B])
    assert pair_losses(logps, CONFIG.loss).shape == batch.weight_B.shape
