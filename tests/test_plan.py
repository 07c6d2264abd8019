"""dpo/plan.py, dpo/simulate.py: what is predicted is what ranks hold; what does not fit is said."""

import json
import os
import socket
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from test_published import PARAMETERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo import plan
from dpo.adamw import AdamW
from dpo.checkpoint import trained_parameters
from dpo.distributed import Ranks, end_process, join_ranks, leave_ranks
from dpo.packing import empty_pack, pack_trees
from dpo.plan import Cluster, Lengths, Plan, Work, planner, published_name, read_shape, stated_tree, work_of
from dpo.policy import load_policy
from dpo.settings import load_config
from dpo.simulate import LAUNCH_S, Meter, State, Trial, Unit, head_cost, seen_keys, state_of, try_pack
from dpo.step import accumulate_gradients
from kernels.backend import choose
from models.attention import Span
from models.families import read_model_config
from models.tiny import write_tiny_model

TRIAL, WORK = Trial(*[0.0] * 7), Work(1, 1, 1, 1, 1, 1, empty_pack(64))
LENGTHS = Lengths(pairs=4, prompt=60, answer=100)
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2048}
LORA, AGAIN = "lora.rank=8", "train.activation_checkpointing=true"
CASES = [  # family, ranks, settings
    ("qwen3", 1),
    ("qwen3", 2),
    ("qwen3", 2, LORA, AGAIN),
    ("qwen3_moe", 1, LORA),
    ("qwen3_moe", 2),
    ("qwen3_moe", 2, AGAIN, "fsdp.expert_units=2"),
    ("qwen3_moe", 2, LORA),
]


@dataclass(frozen=True)
class Case:
    """A small configuration and its model's folder."""

    key: tuple[str | int, ...]
    folder: Path

    @property
    def world(self):
        return self.key[1]

    @property
    def config(self):
        settings = ["exp=smoke", "objective=responses", "pack.tokens=320", "train.batch_pairs=8", *self.key[2:]]
        return load_config([*settings, f"model.path={self.folder}"])

    @property
    def trees(self):
        return [stated_tree(LENGTHS, "responses")] * LENGTHS.pairs  # a pack each: two or four a rank


class Alive(TorchDispatchMode):
    """Bytes of all storages alive, summed anew at every operator: FSDP resizes them under way."""

    def __init__(self, known):
        super().__init__()
        self.peak, self.storages = 0, {}
        for tensor in known:
            self.hold(tensor)

    def hold(self, tensor):
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and type(x) is torch.Tensor:
                self.hold(x)
        alive = [storage for reference in list(self.storages.values()) if (storage := reference()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))
        return result


def own_bytes(tensors):
    local = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in local)


def measure(case: Case, ranks: Ranks) -> dict[str, int]:
    """Bytes that this rank holds after a step, and at the peak of a second one, in fp32 on the CPU."""
    policy = load_policy(case.config, case.folder, torch.float32, ranks)
    parameters = list(trained_parameters(policy).values())
    optimizer = AdamW(parameters, case.config.train)
    references = [torch.zeros(2, dtype=torch.float64)] * LENGTHS.pairs

    def gradients():
        accumulate_gradients(policy, case.trees, references, case.config, ranks)

    gradients()
    held = {"parameters": own_bytes(policy.parameters()), "gradients": own_bytes(p.grad for p in parameters)}
    optimizer.step(1e-4)
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    with Alive([*policy.parameters(), *moments]) as alive:
        gradients()
    return held | {"optimizer": own_bytes(moments), "peak": alive.peak}


def as_rank(rank: int, cases: list[Case], folder: Path) -> None:
    world = cases[0].world
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    torch.set_num_threads(1)
    ranks = join_ranks("cpu", 60.0)
    measured = [measure(case, ranks) for case in cases]
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    leave_ranks(ranks)
    end_process(0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple[str | int, ...], tuple[Case, dict[str, int]]]:
    """Each case with what its first rank measured: those of two ranks in two processes, started once."""
    folder = tmp_path_factory.mktemp("plan")
    for family in {key[0] for key in CASES}:
        write_tiny_model(folder / family, family=family, changes=SIZES)
    cases = [Case(key, folder / key[0]) for key in CASES]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    together = [case for case in cases if case.world > 1]
    multiprocessing.spawn(as_rank, (together, folder), nprocs=2)
    figures = json.loads((folder / "measured.json").read_text())
    alone = [(case, measure(case, Ranks(0, 1, torch.device("cpu")))) for case in cases if case.world == 1]
    every = [*zip(together, figures, strict=True), *alone]
    return {case.key: (case, held) for case, held in every}


@pytest.mark.parametrize("key", CASES)
def test_a_rank_holds_what_is_predicted(measured, key):
    """Between steps to the byte, at the peak within a tenth."""
    case, held = measured[key]
    shape = read_model_config(case.folder)
    work = work_of(case.trees, [1] * len(case.trees), case.config, case.world)
    trial = try_pack(shape, case.config, torch.float32, case.world, work.pack, "H100", "torch")
    state = state_of(shape, case.config, torch.float32, case.world)
    assert (state.parameters, state.gradients, state.optimizer) == tuple(
        held[part] for part in ("parameters", "gradients", "optimizer")
    )
    predicted = sum(Plan(Cluster(case.world, "H100"), state, trial, work).memory.values())
    print(key, f"predicted {predicted / 2**20:.1f} MiB, measured {held['peak'] / 2**20:.1f}")
    assert abs(predicted - held["peak"]) <= 0.1 * held["peak"]


def test_a_meter_counts_products_and_what_is_alive_at_once():
    x = torch.empty(8, 16, device="meta")
    weight = torch.empty(32, 16, device="meta", requires_grad=True)
    with Meter("H100", [x, weight]) as meter:
        y = torch.nn.functional.linear(x, weight)  # 1024 bytes
        kept = y.relu()  # as many again, and kept for the backward
        del y
        assert (meter.live, meter.peak, meter.flop) == (1024, 2048, 2 * 8 * 16 * 32)
        kept.backward(torch.empty_like(kept))
        assert meter.flop == 4 * 8 * 16 * 32  # the weight's gradient: x needs none
        del kept
    assert meter.live == 32 * 16 * 4  # that gradient
    assert meter.time_s >= 4 * LAUNCH_S


def test_a_token_sees_what_its_layers_span_leaves():
    pack = pack_trees([stated_tree(Lengths(1, 6, 3), "responses")], 64)[0].packs[0]  # positions 0 to 5, twice 6 and 7
    assert seen_keys(pack, Span()) == 21 + 2 * (7 + 8)
    assert seen_keys(pack, Span(window=4)) == 10 + 2 * 4 + 4 * 4
    assert seen_keys(pack, Span(chunk=5)) == 15 + 1 + 2 * (2 + 3)


def test_sixty_four_ranks_hold_a_sixty_fourth_and_gather_a_layer_at_a_time():
    config = load_config(["exp=study-large", "lora.rank=0"])
    shape = read_shape(config)[0]
    state = state_of(shape, config, torch.bfloat16, 64)
    assert 1 <= state.parameters * 64 / (4 * PARAMETERS["gpt-oss-120b"]) < 1.01
    assert state.root == 2 * (2 * 201088 * 2880 + 2880)  # embedding, head and the last norm, in bf16
    layers = sum(unit.gathered for unit in state.units if unit.name)
    assert len(state.units) == 37 and 1 <= (layers + state.root) / (2 * PARAMETERS["gpt-oss-120b"]) < 1.01


def test_copies_of_a_model_hold_more_and_experts_in_units_are_gathered_apart():
    config = load_config(["exp=study-large", "lora.rank=0", "model.path=gpt-oss-20b", "fsdp.replicas=8"])
    state = state_of(read_shape(config)[0], config, torch.bfloat16, 64)
    assert state.parts == 8 and 1 <= state.parameters * 8 / (4 * PARAMETERS["gpt-oss-20b"]) < 1.01
    config = load_config(["exp=study-large", "lora.rank=0", "model.path=gpt-oss-20b", "fsdp.expert_units=4"])
    apart = state_of(read_shape(config)[0], config, torch.bfloat16, 64)
    assert len(apart.units) == 24 + 1 + 24 and apart.largest < state.largest / 10
    assert sum(unit.gathered for unit in apart.units) <= 1.01 * sum(unit.gathered for unit in state.units)


def test_nodes_share_what_crosses_between_them():
    units = (Unit("", 640, 0), Unit("layer", 960, 160, backward=2))

    def moved(parts, offload=False):
        one = Plan(Cluster(16, "H100"), State(0, 0, 0, parts, units), TRIAL, WORK, offload)
        return one.forward(), one.backward()

    # 15/16 of 1600 reach a GPU, and half of them from the other node, by 8 cards; then 640 + 2 x 960 + 160.
    assert moved(16) == ((1500, 100, 0), (2550, 170, 0))
    # A whole model a node: only gradients cross, an eighth of them a card, there and back, of one of two copies.
    assert moved(8) == ((1400, 0, 0), (2380, 20, 0))
    assert moved(16, offload=True) == ((1500, 100, 100), (2550, 170, 170))


def test_a_small_head_takes_the_time_of_the_path_that_auto_picks_for_it():
    fused, chunked = (head_cost(4096, 49152, 480, 2, 128, False, "H100", path) for path in ("fused", "chunked"))
    assert choose("sm_90", 480) == "fused" and sum(fused.time_s) < sum(chunked.time_s)


@pytest.mark.parametrize("gpus", ["64", "xH100", "0xH100", "12xH100", "8xH900", "8 x H100", "\u00b2xH100"])
def test_what_is_no_cluster_is_refused(gpus, capsys):
    assert plan.main(["exp=study-large", f"gpus={gpus}"]) == 2
    assert f"error: gpus = '{gpus}': must be NUMBERxKIND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("price=free", "price = 'free' (command line): must be a number above 0"),
        ("pairs=0.5", "pairs = '0.5' (command line): must be a whole number above 0"),
        ("prompt=inf", "prompt = 'inf' (command line): must be a whole number above 0"),
        ("model.path=nobody/Nothing-7B", "model.path = nobody/Nothing-7B: nothing is fetched for a plan"),
        ("gpu=8", "unknown key gpu"),
    ],
)
def test_a_users_mistake_is_told(argument, said, capsys):
    assert plan.main(["exp=study-large", argument]) == 2
    assert said in capsys.readouterr().err


def test_a_hub_id_is_known_by_its_published_shape():
    assert published_name("Qwen/Qwen3-235B-A22B-Instruct-2507") == "Qwen3-235B-A22B"
    assert published_name("meta-llama/Llama-4-Maverick-17B-128E-Instruct") == "Llama-4-Maverick"
    assert published_name("nobody/Nothing-7B") is None


def test_the_command_counts_real_rows_and_says_that_they_fit(tmp_path, capsys):
    assert plan.main(["exp=smoke", "gpus=2xA100", "price=2", f"run.cache={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert "32 training rows, counted" in told and "2 x A100: fits" in told and "at 2 a GPU-hour" in told
    assert "smallest that fits:\n1 x A100: fits" in told


@pytest.mark.long
@pytest.mark.parametrize("gpus", ["64xH100", "256xH100"])
def test_many_ranks_are_planned_within_a_minute(gpus, capsys):
    begin = time.perf_counter()
    assert (
        plan.main(["exp=study-large", f"gpus={gpus}", "lora.rank=0", "train.batch_pairs=256", "pack.tokens=4096"]) == 0
    )
    assert time.perf_counter() - begin < 60
    assert "gathered: root, a layer, the next" in capsys.readouterr().out


@pytest.mark.long
def test_the_studys_model_fits_one_gpu_while_its_experts_stay_packed():
    config = load_config(["exp=study-large"])
    packed = planner(config, Lengths())[1](Cluster(1, "H100"))
    assert packed.fits and 60 < packed.state.parameters / 2**30 < 61
    assert packed.memory["activations"] > 36 * 4000 * 2880 * 2 * 0.5  # each layer's input, of the fuller half of a pack
