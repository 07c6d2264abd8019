"""dpo/policy.py in whole commands: SFT, then DPO on what it left, as merged weights or as an adapter that trains on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reference import Runs, runs  # noqa: F401

import dpo.checkpoint
import dpo.loop
import dpo.train
from dpo.adamw import AdamW
from dpo.checkpoint import trained_digest
from dpo.config import Config, TrainConfig
from dpo.distributed import Ranks
from dpo.step import set_dropout
from models.decoder import load_decoder
from models.lora import Adapter, add_lora
from models.tiny import write_tiny_model

EPS = torch.finfo(torch.float64).eps
SMALL = ("objective=responses", "judge.rows=2", "judge.blind_control=false", "train.lr=1e-2", "checkable.subsets=Focus")
SHAPE = ("lora.rank=2", "lora.alpha=3", "lora.dora=true", "lora.rslora=true", "lora.targets=v_proj,up_proj")


def run_folder(runs: Runs, root: str = "runs") -> Path:  # noqa: F811
    return (runs.folder / root / "smoke" / "latest").resolve()


def adapter_values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "adapter" / "adapter_model.safetensors")


def test_a_checkpoint_in_many_shards_comes_back_bit_for_bit(tmp_path, monkeypatch):
    write_tiny_model(tmp_path / "model")
    saved, fresh = (
        load_decoder(tmp_path / "model", weight_dtype=torch.float32, compute_dtype=torch.float32) for _ in "ab"
    )
    of = [AdamW(list(model.requires_grad_().parameters()), TrainConfig()) for model in (saved, fresh)]
    for parameter in saved.parameters():
        parameter.grad = torch.randn_like(parameter)
    of[0].step(1e-2)
    monkeypatch.setattr(dpo.checkpoint, "FILE_BYTES", 1)  # as small as may be: FILES bounds their number
    alone = Ranks(0, 1, torch.device("cpu"))
    dpo.checkpoint.save(tmp_path / "step-1", saved, {"step": 1}, alone, of[0])
    assert 4 < len(list((tmp_path / "step-1").glob("shard-*"))) <= dpo.checkpoint.FILES + 1
    assert dpo.checkpoint.load(tmp_path / "step-1", fresh, alone, of[1]) == {"step": 1}
    for one, other in zip(saved.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(of[0].state[one][key], of[1].state[other][key]) for key in of[0].state[one])


def test_dpo_goes_on_from_the_merged_weights_of_sft(runs):  # noqa: F811
    runs.results(*SMALL, "loss.name=sft")
    sft = run_folder(runs)
    results = runs.results(*SMALL, f"model.path={sft / 'export' / 'model'}")
    assert results["step0_max_difference"] == 0 and results["step0_loss"] == pytest.approx(math.log(2), rel=64 * EPS)
    assert results["reference"]["misses"] > 0  # SFT did change the weights: the reference is what it left


def test_dpo_trains_the_adapter_of_sft_on_against_it_or_against_the_base(runs):  # noqa: F811
    base = runs.results(*SMALL, *SHAPE, "loss.name=sft", "loss.mix=sigmoid:0.1")  # which asks for the reference
    sft = run_folder(runs)
    going_on = (*SMALL, f"model.adapter={sft / 'export' / 'adapter'}", "lora.dropout=0.2")
    results = runs.results(*going_on)
    first = run_folder(runs)
    assert results["step0_max_difference"] == 0 and results["step0_loss"] == pytest.approx(math.log(2), rel=64 * EPS)
    assert results["reference"]["misses"] == base["reference"]["misses"] > 0  # the adapter is part of the weights
    assert results["judge"]["base"] == base["judge"]["trained"]  # it starts as the judge that SFT left
    before, after = adapter_values(sft), adapter_values(first)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    told = json.loads((first / "config.json").read_text())["lora"]
    assert (told["rank"], told["alpha"], told["dora"], told["rslora"]) == (2, 3, True, True)
    written = json.loads((first / "export" / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["up_proj", "v_proj"] and written["lora_dropout"] == 0.2

    results = runs.results(*going_on, "reference.path=tiny-random", "loss.beta=0.3")
    assert results["step0_max_difference"] > 1e-3  # an adapter on the reference: reported, not checked
    assert runs.reference_forwards() == 0  # the base's log-probs are SFT's, the policy's judging the run's before


def test_dropout_is_on_in_the_gradients_of_all_steps_but_the_first_and_nowhere_else(runs, monkeypatch):  # noqa: F811
    on: dict[str, list[bool]] = {"gradient": [], "score": []}
    score, accumulate = dpo.train.score_trees, dpo.loop.accumulate_gradients

    def scored(model, *rest):
        on["score"].append(model.training)
        return score(model, *rest)

    def accumulated(policy, *rest, one_kernel, routes):
        on["gradient"].append(policy.training)
        return accumulate(policy, *rest, one_kernel=one_kernel, routes=routes)

    monkeypatch.setattr("dpo.train.score_trees", scored)
    monkeypatch.setattr("dpo.loop.accumulate_gradients", accumulated)
    runs.results(*SMALL, *SHAPE, "lora.dropout=0.2", "train.max_steps=3", "train.eval_every_steps=1")
    assert on["gradient"] == [False, True, True]
    assert len(on["score"]) >= 6 and not any(on["score"])


def test_dropout_draws_anew_for_every_step_seed_and_rank_and_the_same_for_the_same():
    def draw(step: int, seed: int, rank: int) -> float:
        config = Config(exp="test", seed=seed, lora={"rank": 1, "dropout": 0.5})
        set_dropout(torch.nn.Identity(), step, config, Ranks(rank, 2, torch.device("cpu")))
        return float(torch.rand(1))

    places = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    assert [draw(*place) for place in places] == [draw(*place) for place in places]
    assert len({draw(*place) for place in places}) == len(places)


def test_the_services_job_runs_with_its_checkpoints_and_validations_evenly_spaced_and_all_kept(runs):  # noqa: F811
    counts = ("train.n_checkpoints=3", "train.n_evals=2", "train.max_steps=6", "train.epochs=3", "train.batch_pairs=6")
    runs.results("model.path=tiny-random", "judge.rows=2", *counts, exp="together")
    folder = (runs.folder / "runs" / "together" / "latest").resolve()
    assert sorted(path.name[-1] for path in (folder / "checkpoints").glob("step-*")) == ["2", "4", "6"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([1e-5 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)])
    adapter = json.loads((folder / "export" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (8, 8, 7)


@pytest.mark.parametrize("wrong", ["lora.rank=4", "lora.alpha=8", "lora.targets=q_proj"])
def test_a_lora_key_that_the_given_adapter_contradicts_is_refused(runs, capsys, wrong):  # noqa: F811
    runs.results(*SMALL, *SHAPE, "train.max_steps=1")
    adapter = run_folder(runs) / "export" / "adapter"
    assert dpo.train.main(runs.argv(f"model.adapter={adapter}", wrong, f"run.root={runs.folder / 'other'}")) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err and not (runs.folder / "other").exists()


@pytest.mark.parametrize("adapter", ["nowhere", "model.safetensors of another model"])
def test_an_adapter_that_is_not_there_or_does_not_fit_is_named(runs, capsys, tmp_path, adapter):  # noqa: F811
    place = tmp_path / "nowhere"
    if adapter != "nowhere":
        runs.results(*SMALL, *SHAPE, "train.max_steps=1")
        place = run_folder(runs) / "export" / "adapter"
        config = place / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    assert dpo.train.main(runs.argv(f"model.adapter={place}", f"run.root={runs.folder / 'other'}")) == 2
    assert f"error: {place}" in capsys.readouterr().err and not (runs.folder / "other").exists()


def test_adapters_of_another_scale_are_other_weights(tmp_path: Path) -> None:
    """The bytes of A and B are the same, and what they add to the base is not."""
    write_tiny_model(tmp_path / "model")
    digests = set()
    for alpha in (8.0, 64.0, 8.0):
        model = load_decoder(tmp_path / "model", weight_dtype=torch.float32, compute_dtype=torch.float32)
        add_lora(model.requires_grad_(False), Adapter(2, alpha), seed=0)
        digests.add(trained_digest(model, "base"))
    assert len(digests) == 2
