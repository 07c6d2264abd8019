"""dpo/routes.py: routes are found again whatever they are packed with; flips, replay, load, the balancing loss."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from test_exactness import ALONE, CONFIG, random_tree

from dpo import train
from dpo.config import Config
from dpo.logprobs import pack_logps, score_trees
from dpo.packing import pack_trees
from dpo.pairs import reference_sums
from dpo.routes import Routes, _address, keeps_routes, routes_of, segments, store_missing, store_routes, tree_addresses
from dpo.settings import load_config
from dpo.step import accumulate_gradients, means
from dpo.store import read_values
from dpo.trees import Completion, Stem, Tree
from models.decoder import Decoder
from models.errors import UserError
from models.moe import MoE
from models.routing import Routing
from models.tiny import write_tiny_model
from tests.moe_models import decoder, model_config

TREES = [random_tree(seed) for seed in range(8)]


def config(**moe: object) -> Config:
    return CONFIG.model_copy(update={"moe": Config(exp="x", moe=moe).moe})


def stored(model: Decoder, folder) -> list:
    def score(trees, note):
        return score_trees(model, trees, CONFIG.pack, ALONE, "test", note)

    folder.mkdir(exist_ok=True)
    return store_routes(folder, TREES, score, ALONE)


def step(model: Decoder, references, config: Config, folder) -> tuple[dict[str, float], torch.Tensor, Routes]:
    """The figures and the whole gradient of one step on all trees."""
    routes = routes_of(config, model.config, folder)
    assert routes is not None
    model.requires_grad_(True).zero_grad()
    sums = accumulate_gradients(model, TREES, references, config, ALONE, routes=routes)
    assert routes.asked
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return means(sums) | {"difference": sums["difference"]} | routes.figures(ALONE), gradient, routes


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder("gpt_oss", torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    place = tmp_path_factory.mktemp("routes") / "store"
    stored(model, place)
    return place


@pytest.fixture(scope="module")
def references(model) -> list[torch.Tensor]:
    return [reference_sums(logps) for logps in score_trees(model, TREES, CONFIG.pack, ALONE, "test")]


def turned(model: Decoder) -> Decoder:
    """The model with its first router's experts renamed in part: expert 0 and 1 change places for the router alone."""
    other = copy.deepcopy(model)
    router = next(m for m in other.modules() if isinstance(m, MoE)).router
    with torch.no_grad():
        router.weight[[0, 1]], router.bias[[0, 1]] = router.weight[[1, 0]].clone(), router.bias[[1, 0]].clone()
    return other


def test_a_pack_and_its_trees_have_the_same_addresses():
    found = {address for batch in pack_trees(TREES, 256) for pack in batch.packs for address, _ in segments(pack)}
    assert found == {address for tree in TREES for address in tree_addresses(tree)}
    rows = [rows for batch in pack_trees(TREES, 256) for pack in batch.packs for _, rows in segments(pack)]
    assert sum(part.stop - part.start for part in rows) == sum(
        pack.layout.tokens for batch in pack_trees(TREES, 256) for pack in batch.packs
    )


def test_where_the_prefix_and_the_prompt_end_is_in_the_address():
    """As in a log-prob's: it changes the shapes that the last bits come from."""
    tree = Tree("t", (1, 2, 3, 4), ((5, 6),), (Completion(0, 0, (5, 6, 7)),), (), 2)
    others = replace(tree, prefix=0), replace(tree, prefix=1), replace(tree, prompt=(1, 2, 3), branches=((4, 5, 6),))
    for other in others:
        assert tree_addresses(tree) & tree_addresses(other) <= {_address((2,), (1, 2))}
    stemmed = [replace(tree, stems=((Stem(0, 1),),) * bool(stem)) for stem in (0, 1)]
    addresses = [tree_addresses(one) for one in stemmed]
    assert [len(found) for found in addresses] == [3, 4] and len(addresses[0] & addresses[1]) == 2


def test_routes_are_a_byte_each_and_the_same_whatever_they_were_packed_with(model, folder, tmp_path):
    wanted = {address for tree in TREES for address in tree_addresses(tree)}
    values = read_values(folder, wanted)
    assert values.keys() == wanted and {value.dtype.name for value in values.values()} == {"uint8"}
    longest = max(len(value) for value in values.values())
    assert longest == max(len(t.prompt) - t.prefix for t in TREES) * 2 * 3  # 2 layers, 3 experts a token
    (tmp_path / "alone").mkdir()
    for tree in TREES:
        score = lambda trees, note: score_trees(model, trees, CONFIG.pack, ALONE, "test", note)  # noqa: E731
        store_routes(tmp_path / "alone", [tree], score, ALONE)
    alone = read_values(tmp_path / "alone", wanted)
    assert all((alone[address] == value).all() for address, value in values.items())


def test_what_is_stored_is_not_computed_again_and_what_is_missing_is(model, folder, tmp_path):
    asked: list[int] = []
    store_missing(folder, TREES, lambda trees: asked.append(len(trees)), ALONE)
    assert asked == []
    (tmp_path / "store").mkdir()
    store_missing(tmp_path / "store", TREES, lambda trees: asked.append(len(trees)), ALONE)
    assert asked == [len(TREES)]


def test_before_the_first_update_no_route_differs_and_no_log_prob(model, folder, references):
    for how in ("compare", "replay"):
        figures, _, _ = step(copy.deepcopy(model), references, config(routes=how), folder)
        assert figures["moe/route_flips"] == 0 and figures["difference"] == 0


def test_flips_are_the_choices_that_the_reference_did_not_make(model, folder, references):
    other = turned(model)
    figures, _, _ = step(other, references, config(), folder)
    flips = compared = 0
    for batch in pack_trees(TREES, CONFIG.pack.tokens):
        for pack in batch.packs:
            chosen = []
            for one in (model, other):
                routing = Routing(pack.layout.tokens)
                with torch.no_grad():
                    pack_logps(one, pack, CONFIG.pack.head_chunk, routing)
                chosen.append(routing.own)
            for layer, ours_TK in chosen[1].items():
                for ours, theirs in zip(ours_TK.tolist(), chosen[0][layer].tolist(), strict=True):
                    flips += len(set(ours) - set(theirs))
                    compared += len(ours)
    assert 0 < flips < compared and figures["moe/route_flips"] == flips / compared


def test_replay_sends_the_policys_tokens_where_the_reference_sent_them(model, folder, references):
    """Its first router alone is changed: with the reference's choices, what differs is the weights of the answers."""
    other = turned(model)
    figures, gradient, _ = step(other, references, config(routes="replay"), folder)
    free, free_gradient, _ = step(other, references, config(), folder)
    own, _, _ = step(copy.deepcopy(model), references, config(), folder)
    assert figures["moe/route_flips"] > 0 and figures["difference"] != free["difference"]
    assert not torch.equal(gradient, free_gradient)
    assert figures["moe/max_load"] == own["moe/max_load"] != free["moe/max_load"]


def test_the_balancing_loss_stands_apart_and_is_in_the_gradient_by_its_weight(references):
    (plain, gradient, _), (one, with_one, _), (two, with_two, _) = (
        step(decoder("gpt_oss", torch.float64), references, config(aux_loss=weight, routes="off"), None)
        for weight in (0.0, 1.0, 2.0)
    )
    assert "moe/aux_loss" not in plain and one["moe/aux_loss"] == two["moe/aux_loss"] > 3
    assert one["loss"] == two["loss"] == plain["loss"]
    assert (with_two - gradient).norm() > 0
    assert torch.allclose(with_two - gradient, 2 * (with_one - gradient), rtol=1e-6, atol=1e-12)


def test_the_load_is_the_busiest_experts_share_over_the_mean(model, folder, references):
    figures, _, routes = step(copy.deepcopy(model), references, config(routes="off"), None)
    assert 1 < figures["moe/max_load"] < 8 and "moe/route_flips" not in figures and not routes.asked


def test_routes_of_other_experts_are_neither_compared_nor_replayed():
    policy, other = model_config("gpt_oss"), model_config("gpt_oss", num_local_experts=4)
    assert keeps_routes(config(), policy, policy) and not keeps_routes(config(), policy, other)
    with pytest.raises(UserError, match="moe.routes = replay"):
        keeps_routes(config(routes="replay"), policy, other)


# --- the whole command ----------------------------------------------------------------------------------------------


def run(place, *more: str) -> tuple[dict, list[dict]]:
    """Three steps of the smoke run on a tiny gpt-oss; its results and its metrics."""
    small = (
        "checkable.train_rows=8",
        "checkable.test_rows=4",
        "checkable.validation_rows=4",
        "checkable.subsets=Focus",
    )
    quick = (
        "judge.blind_control=false",
        "log.plots=false",
        "train.batch_pairs=4",
        "train.max_steps=3",
        "train.lr=0.01",
    )
    where = (f"model.path={place / 'model'}", f"run.root={place / 'runs'}", f"run.cache={place / 'cache'}")
    folder = train.run(load_config(["exp=smoke", *small, *quick, *where, *more]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "results.json").read_text()), [line for line in lines if "loss" in line]


def test_a_run_counts_flips_against_a_stored_reference_and_replays_it_without_another_forward(tmp_path):
    write_tiny_model(tmp_path / "model", family="gpt_oss")
    lora = ("lora.rank=4", "lora.targets=all-linear,experts.gate_up_proj,experts.down_proj")
    first, lines = run(tmp_path, *lora, "moe.aux_loss=0.1")
    assert first["step0_max_difference"] == 0 and first["reference"]["misses"] > 0
    assert lines[0]["moe/route_flips"] == 0 < lines[-1]["moe/route_flips"] < 1
    assert all(line["moe/max_load"] >= 1 and line["moe/aux_loss"] >= 1 for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    replayed, again = run(tmp_path, *lora, "moe.routes=replay")
    assert replayed["reference"]["misses"] == 0 and replayed["step0_max_difference"] == 0
    assert again[0]["moe/route_flips"] == 0 and "moe/aux_loss" not in again[0]
    full, trained = run(tmp_path, "lora.rank=0", "moe.routes=off")
    assert full["step0_max_difference"] == 0 and "moe/route_flips" not in trained[0]


def test_keys_of_experts_are_refused_where_nothing_would_read_them(tmp_path):
    write_tiny_model(tmp_path / "model")
    for key in ("moe.aux_loss=0.1", "moe.routes=replay"):
        with pytest.raises(UserError, match="moe.aux_loss, moe.routes: .* has no experts"):
            run(tmp_path, key)
    with pytest.raises(UserError, match="model.experts = packed: .*no MXFP4"):
        run(tmp_path, "model.experts=packed", "lora.rank=2")
    assert not (tmp_path / "runs").exists()


def test_a_mixture_whose_layers_are_all_dense_trains_as_a_model_without_experts(tmp_path):
    write_tiny_model(tmp_path / "model", family="qwen3_moe", changes={"mlp_only_layers": [0, 1]})
    results, lines = run(tmp_path)
    assert results["step0_max_difference"] == 0 and not any(key.startswith("moe/") for key in lines[0])
