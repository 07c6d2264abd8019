"""What other trainers get wrong, each with the test here that it does not happen; the tests below fill the gaps.

Numerical and semantic pitfalls:
 1 step 0 is not ln 2               test_pitfalls::test_step_0_is_exact_under_every_loss
   ... nor checked in a run         test_train::test_a_stored_reference_that_does_not_fit_stops_the_run_at_step_0
 2 log-softmax of bf16 logits       test_linear_logprobs::test_error_is_at_most_twice_that_of_plain_torch_in_fp32
 3 logits of all tokens in memory   test_linear_logprobs::test_nothing_of_tokens_times_vocabulary_is_held_when_the_head_is_frozen
 4 means of means, token weights    test_pitfalls::test_gradient_and_figures_of_any_loss_are_the_same_for_every_split
 5 metrics not weighed by pairs     test_pitfalls::test_gradient_and_figures_of_any_loss_are_the_same_for_every_split
   ... duplicates in evaluation     test_distributed::test_three_ranks_end_where_one_process_ends_and_a_tree_may_take_two_packs
 6 lengths with prompt or padding   test_pitfalls::test_lengths_are_those_of_the_scored_tokens_alone
   ... of zero tokens               test_losses::test_equal_sequences_of_one_token_or_none_are_finite_with_finite_gradients
 7 prompt boundary, BOS, last token test_tokenizer::test_prompt_and_completion_are_the_whole_chat_up_to_its_last_end
   ... encoded with a second BOS    test_tokenizer::test_encoding_adds_nothing_and_parses_special_tokens
 8 truncation of one side           test_tokens::test_a_cut_prompt_fits_keeps_the_chat_around_it_and_all_of_the_answers
 9 padding left, shifted positions  test_pitfalls::test_padding_lies_right_and_positions_count_from_zero
10 MoE balancing loss by default    test_train::test_loss_metrics_and_gradient_of_a_step_are_those_of_plain_sequences_and_a_plain_formula
   (no auxiliary term is in the loss; there is no MoE model yet, its routing tests come with it)
11 adapters that silently stay put  test_lora::test_only_the_updates_train_and_they_do
12 FSDP2 with checkpointing         test_distributed::test_two_ranks_end_where_one_process_ends_with_adapters
   ... two forwards, one backward   test_distributed::test_three_ranks_end_where_one_process_ends_and_a_tree_may_take_two_packs
13 another reference after resume   test_pitfalls::test_a_resumed_run_keeps_its_reference_and_refuses_another
14 LD-DPO on the policy alone       test_pitfalls::test_ld_dpo_starts_at_ln_2_and_asks_for_no_reference_pass
   ... tails added in another order test_pairs::test_tails_from_packs_have_the_bits_of_tails_from_the_store
15 exp() that overflows             test_losses::test_margins_of_ten_thousand_nats_keep_every_loss_and_gradient_finite
   ... or is clamped to no gradient test_losses::test_beyond_thirty_nats_an_exponential_goes_on_as_its_tangent_and_keeps_its_gradient

Faults found in other trainers' source, by its list's number:
0.1 cache misses on every arm       test_reference::test_another_beta_rate_seed_loss_name_or_adapter_runs_no_reference_forward
    ... stale under ld_alpha        test_pitfalls::test_ld_dpo_starts_at_ln_2_and_asks_for_no_reference_pass
    ... stale under another span    test_reference::test_another_token_and_another_span_miss_alone
0.2 the balancing loss              as 10
0.3 pairs weigh by their tokens     as 4
0.4 resume makes the trained policy the reference, cache keyed by names
                                    test_pitfalls::test_a_resumed_run_keeps_its_reference_and_refuses_another
    ... adapter on in the cache     test_reference::test_a_policy_that_is_an_adapter_on_the_reference_starts_at_the_stored_values
0.5 WPO of sums and masks           test_losses::test_wpo_weighs_a_pair_by_its_probability_per_token_and_sends_no_gradient_through_the_weight
0.6 IPO is NaN at step 0            test_pitfalls::test_step_0_is_exact_under_every_loss
0.7 a reference key without effect  test_reference::test_a_reference_of_other_weights_is_used_and_its_step_0_reported_not_checked
    ... no held-out margin          test_train::test_the_run_folder_is_complete_and_every_line_of_its_metrics_has_its_figures
0.8 LD-DPO on the policy alone      as 14
0.9 an extra space, a forced EOS    test_trees::test_a_responses_scored_tokens_are_the_answer_and_its_end_of_turn
0.10 the last rows are dropped      test_schedule::test_every_row_comes_once_an_epoch_and_steps_never_cross_epochs
0.11 no packing, no reference cache test_exactness::test_packed_trees_equal_one_sequence_at_a_time_in_values_and_gradients
0.13 sft depends on the split       as 4; duplicates in evaluation: as 5
    ... label_smoothing is ignored  test_losses::test_what_would_be_ignored_or_is_no_loss_is_refused
    ... and where it is not         test_losses_trl::test_label_smoothing_works_where_trls_sigmoid_ignores_it
0.14 prompts and answers run twice  test_trees::test_each_answer_is_run_once_however_many_pairs_it_is_in
0.12 (gc in every step, version pins) is about speed and packaging and has no test.
"""  # noqa: E501

import ast
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved import saved_tensors
from test_exactness import ALONE, CONFIG, model, one_at_a_time, random_tree
from test_reference import Runs, write_small_rows

import dpo.train
from dpo.config import Config
from dpo.distributed import Ranks
from dpo.logprobs import score_trees
from dpo.losses import LOSSES, READ_BY
from dpo.packing import pack_trees
from dpo.pairs import tree_sums
from dpo.step import accumulate_gradients, means
from dpo.trees import Tree
from models.tiny import write_tiny_model

EPS = torch.finfo(torch.float64).eps


def test_every_test_that_the_table_names_exists():
    named = re.findall(r"(test_\w+)::(test_\w+)", __doc__ or "")
    assert len(named) > 35
    for module, test in named:
        source = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in source.body), f"{module}::{test}"
    assert {int(number) for number in re.findall(r"^ ?(\d+) ", __doc__ or "", flags=re.M)} >= set(range(1, 16))


def settings(**loss) -> Config:
    smooth = {"label_smoothing": 0.1} if loss.get("name") in ("robust", "exo_pair") else {}
    return Config(exp="test", pack=CONFIG.pack.model_dump(), loss=smooth | loss)


def with_twins(tree: Tree, index: int) -> Tree:
    """Each pair beside itself exchanged, as if it were its twin, and with values of its own."""
    pairs = [
        replace(pair, margin=0.1 * index, soft_label=1 - 0.05 * (index % 3), twin=2 * place + other)
        for place, one in enumerate(tree.pairs)
        for other, pair in ((1, one), (0, replace(one, winner=one.loser, loser=one.winner)))
    ]
    return replace(tree, pairs=tuple(pairs))


TREES = [with_twins(random_tree(seed), seed) for seed in range(8)]
LN_2 = {"sigmoid", "dpo_norm", "dpop", "robust"}  # without margins


@pytest.mark.parametrize("name", sorted(READ_BY["reference"]))
def test_step_0_is_exact_under_every_loss(tiny_folder, name):
    """bf16, references scored in other packs: every log-ratio is 0, so the loss is its value at 0, to the last bits."""
    trees = [random_tree(seed) for seed in range(8)]
    config = settings(name=name, beta=0.2)
    decoder = model(tiny_folder, torch.bfloat16, trains=True)
    scored = score_trees(decoder, trees[::-1], config.pack, ALONE, "test")[::-1]
    references = [tree_sums(logps, tree, config.loss) for logps, tree in zip(scored, trees, strict=True)]
    sums = accumulate_gradients(decoder, trees, references, config, ALONE)
    figures = means(sums)
    assert sums["difference"] == 0 and figures["rewards/margins"] == 0 and figures["rewards/accuracies"] == 0.5
    if name in LN_2:
        assert 0.69314 < figures["loss"] < 0.69316 and figures["loss"] == pytest.approx(math.log(2), rel=64 * EPS)
    if name in ("ipo", "ipo_sum"):
        assert figures["loss"] == pytest.approx(1 / (4 * 0.2**2), rel=64 * EPS)
    assert math.isfinite(figures["loss"])
    assert all(bool(p.grad.isfinite().all()) for p in decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "ipo"},
        {"name": "sft"},
        {"mix": ["sft:0.5", "nca_pair:2"]},
        {"wpo": True, "rpo_alpha": 0.3},
        {"ld_alpha": 0.25},
        {"swap_consistency": 0.1, "label_smoothing": 0.1},
    ],
    ids=lambda loss: "+".join(loss),
)
def test_gradient_and_figures_of_any_loss_are_the_same_for_every_split(tiny_folder, monkeypatch, loss):
    """Packs and ranks split the step's pairs; weights, margins, soft labels, lengths and twins go with them."""
    monkeypatch.setattr("dpo.step.total", lambda sums, ranks: sums)
    outcomes = []
    for pack_tokens, world in ((1024, 1), (128, 1), (256, 3)):
        config = settings(**loss)
        config = config.model_copy(update={"pack": config.pack.model_copy(update={"tokens": pack_tokens})})
        decoder = model(tiny_folder, torch.float64, trains=True)
        scored = score_trees(decoder, TREES, config.pack, ALONE, "test")
        references = [
            tree_sums(one, tree, config.loss) + i for i, (one, tree) in enumerate(zip(scored, TREES, strict=True))
        ]
        references = [one * torch.linspace(0.9, 1.1, len(one), dtype=torch.float64) for one in references]
        figures: dict[str, float] = {}
        for rank in range(world):
            ranks = Ranks(rank, world, torch.device("cpu"))
            for key, value in accumulate_gradients(decoder, TREES, references, config, ranks).items():
                figures[key] = figures.get(key, 0.0) + value
        gradient = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
        outcomes.append((gradient, means(figures)))
    (whole, figures), *others = outcomes
    assert figures["loss"] != 0 and whole.norm() > 0
    for gradient, same in others:
        assert (gradient - whole).norm() <= 2000 * EPS * whole.norm()
        for key, value in figures.items():
            assert abs(same[key] - value) <= 2000 * EPS * max(1, abs(value), abs(figures["logps/chosen"])), key


@pytest.mark.parametrize("name", ["ipo", "dpo_norm", "simpo", "orpo", "sft", "rdpo"])
def test_lengths_are_those_of_the_scored_tokens_alone(tiny_folder, name):
    """Against one sequence at a time, a length being what is scored: no prompt, no padding, no shift by one."""
    from test_losses import PLAIN, smoothed

    trees = [random_tree(seed) for seed in range(8)]
    config = settings(name=name, beta=0.3)
    decoder = model(tiny_folder, torch.float64, trains=True)
    references = [torch.linspace(-3, -9, len(tree.completions), dtype=torch.float64) for tree in trees]
    ours = means(accumulate_gradients(decoder, trees, references, config, ALONE))["loss"]
    total = weight = 0.0
    for tree, reference_S in zip(trees, references, strict=True):
        logp, zero = one_at_a_time(decoder, tree).tolist(), reference_S.tolist()
        for pair in tree.pairs:
            a, b = logp[pair.winner], logp[pair.loser]
            lengths = [len(tree.completions[i].targets) for i in (pair.winner, pair.loser)]
            one = PLAIN[name](math, a - zero[pair.winner], b - zero[pair.loser], a, b, *lengths, config.loss)
            total, weight = total + pair.weight * one, weight + pair.weight
    assert smoothed(name) == 0
    assert ours == pytest.approx(total / weight, rel=2.0**-36)


def test_padding_lies_right_and_positions_count_from_zero():
    for batch in pack_trees([random_tree(seed) for seed in range(20)], 256):
        for pack in batch.packs:
            positions, row = pack.positions_T.tolist(), 0

            def check(shape, begin):  # each run goes on from the end of what it sees, wherever it lies
                nonlocal row
                own, rest = (shape, ()) if isinstance(shape, int) else shape
                assert positions[row : row + own] == list(range(begin, begin + own))  # noqa: B023
                row += own
                for part in rest:
                    check(part, begin + own)  # noqa: B023

            check(pack.layout, 0)
            used = row
            assert used == pack.layout.tokens and positions[0] == 0 and positions[used:] == [0] * (256 - used)
            assert not pack.tokens_T[used:].any() and pack.rows_R.max() < used


# --- whole commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    write_small_rows(tmp_path / "rows.jsonl")
    yield Runs(tmp_path, [])
    torch.set_flush_denormal(False)


def test_ld_dpo_starts_at_ln_2_and_asks_for_no_reference_pass(runs):
    """Answers of unequal lengths; the plain run's values serve, tails and all."""
    base = ("objective=responses", "dtype=fp32")
    assert runs.results(*base)["reference"]["misses"] > 0
    for alpha in (0, 0.5):
        results = runs.results(*base, f"loss.ld_alpha={alpha}")
        assert results["reference"]["misses"] == 0 and results["step0_max_difference"] == 0
        assert results["step0_loss"] == pytest.approx(math.log(2), rel=64 * EPS)
    lines = [json.loads(line) for line in (latest(runs) / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss" in line and math.isfinite(line["eval/loss"]) for line in lines)


def latest(runs: Runs) -> Path:
    return (runs.folder / "runs" / "smoke" / "latest").resolve()


def test_a_resumed_run_keeps_its_reference_and_refuses_another(runs, capsys):
    """Even with its stored log-probs gone, the reference is the weights of the start, never those trained by now."""
    other = runs.folder / "other"
    write_tiny_model(other, seed=1)
    argv = ("dtype=fp32", "train.checkpoint_every_steps=1", "train.lr=0.01", f"reference.path={other}")
    runs.results(*argv)
    folder = latest(runs)
    whole = saved_tensors(folder / "checkpoints" / "step-000002")
    figures = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def forget() -> None:
        shutil.rmtree(folder / "checkpoints" / "step-000002")
        (folder / "checkpoints" / "finished.json").unlink()
        shutil.rmtree(runs.folder / "cache" / "reference")

    forget()
    assert runs.results(*argv, "run.resume=latest")["reference"]["misses"] > 0
    again = saved_tensors(folder / "checkpoints" / "step-000002")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    resumed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("loss") for line in resumed] == [line.get("loss") for line in figures]

    write_tiny_model(other, seed=2)  # other weights under the same name
    for prepare in (lambda: None, forget):  # finished, and not
        prepare()
        capsys.readouterr()
        assert dpo.train.main(runs.argv(*argv, "run.resume=latest")) == 2
        said = capsys.readouterr().err
        assert (
            "was begun with a reference and start of other weights (" in said
            and "start a new run" in said
            and "Traceback" not in said
        )


def test_every_loss_trains_by_its_name_and_evaluates(runs):
    """One run mixes all that verdicts can have; none of it asks for more than the plain run's reference values."""
    assert runs.results("loss.label_smoothing=0.1")["reference"]["misses"] > 0
    mix = ",".join(f"{name}:0.1" for name in LOSSES if name not in ("sigmoid", "rdpo"))
    results = runs.results(f"loss.mix={mix}", "loss.label_smoothing=0.1", "loss.wpo=true", "loss.swap_consistency=0.1")
    assert results["reference"]["misses"] == 0 and math.isfinite(results["step0_loss"])
    lines = [json.loads(line) for line in (latest(runs) / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line.get("loss", 0.0)) and math.isfinite(line.get("eval/loss", 0.0)) for line in lines)
    free = runs.results("loss.name=simpo", "loss.mix=orpo:1,cpo:1,slic:1,sft:1")
    assert free["reference"]["misses"] == 0 and free["step0_max_difference"] == 0
    assert math.isfinite(runs.results("objective=responses", "loss.name=rdpo")["step0_loss"])  # of answers' lengths
