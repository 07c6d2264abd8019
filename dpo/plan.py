"""python -m dpo.plan exp=NAME gpus=64xH100 [price=2.5] [key=value ...]: does it fit, how long, at what cost.

No GPU is asked and no weight is read: see dpo/simulate.py for what is counted. No dimension letters.

Rows are counted where model.path is a folder or a model of ours. Of a published shape (models/published.py, by its Hub
id) there is no tokenizer at hand: there are then as many rows of one pair and of as many tokens as pairs=, prompt= and
answer= say. Modelled, not measured: a kernel runs at kernels/roofline.py's rates, links at LINK_SHARE of their data
sheet's, and gathering weights hides behind computing.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dpo.config import Config
from dpo.inputs import DTYPES, cache_folder, read_inputs
from dpo.packing import Batch, Pack, pack_share
from dpo.policy import with_experts
from dpo.settings import load_config
from dpo.simulate import ADAM_BYTES, State, Trial, state_of, try_pack
from dpo.step import plan_steps
from dpo.trees import Completion, Pair, Tree
from kernels.roofline import GPUS
from models.config import ModelConfig
from models.errors import UserError, exit_code
from models.families import FAMILIES, parse_model_config, read_model_config
from models.gguf_import import resolve_model_path
from models.hub import is_hub_id
from models.published import PUBLISHED

NODE = 8  # GPUs
LINK_SHARE = 0.8  # assumed: what collectives reach of a link
RESERVED = 0.08  # assumed: CUDA's context, NCCL's buffers, holes
SAMPLED_STEPS = 16  # whose packs are counted
HOST_BANDWIDTH = 3e10  # assumed: bytes a second of the host's memory for each GPU's optimizer, where it is offloaded
MOST = 512  # GPUs that are tried
TABLE = ("gpt-oss-20b", "gpt-oss-120b", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-4-Scout", "Llama-4-Maverick")
EXPERTS = "lora.targets=all-linear,experts.gate_up_proj,experts.down_proj"
USAGE = """\
usage: python -m dpo.plan exp=NAME gpus=8xH100 [price=2.5] [key=value ...]
  python -m dpo.plan exp=study-large gpus=1xH100 price=2.5
  python -m dpo.plan exp=study-large gpus=64xH200 model.path=Qwen/Qwen3-235B-A22B lora.rank=0 train.batch_pairs=64
  python -m dpo.plan exp=study-large --table

gpus: up to 8, or whole nodes of 8, of A100, H100, H200, B200, MI300X; price: of a GPU and hour; pairs, prompt, answer:
rows and tokens of a published model's run. All other keys: python -m dpo.train --help"""


class Place(NamedTuple):
    """Of a GPU: memory, GiB (as torch reports it); links, GB/s each way: in its node, to others, to the host."""

    memory_gib: float
    node: float
    across: float
    host: float


PLACES = {  # data sheets (HGX boards with NVLink 3, 4, 5; Infinity Fabric), a network card a GPU (HDR, NDR), PCIe 4, 5
    "A100": Place(79.2, 300, 25, 32),
    "H100": Place(79.1, 450, 50, 64),
    "H200": Place(139.8, 450, 50, 64),
    "B200": Place(178.4, 900, 50, 64),
    "MI300X": Place(191.5, 448, 50, 64),
}


class Cluster(NamedTuple):
    """So many GPUs of a kind, NODE to a node."""

    gpus: int
    kind: str

    @property
    def usable_gib(self) -> float:
        return PLACES[self.kind].memory_gib * (1 - RESERVED)


class Lengths(NamedTuple):
    """Stated rows: how many, of one pair, and tokens of a prompt and of an answer."""

    pairs: int = 4866  # the study's training pairs
    prompt: int = 300
    answer: int = 400


@dataclass(frozen=True)
class Work:
    """What the ranks do: a pack is run by each rank in turn, and idle ones run empty packs."""

    steps: int
    packs: float  # of a rank in a step
    tokens: float  # of all ranks in a step, without padding
    together: int  # packs that are kept until their loss is taken
    busy: float  # share of the ranks that have a row in a step
    epochs: int
    pack: Pack  # the fullest


# --- what is asked ----------------------------------------------------------------------------------------------------


def parse_cluster(text: str) -> Cluster:
    """8xH100 -> so many GPUs; UserError where that is no cluster."""
    count, _, kind = text.partition("x")
    whole = count.isdecimal() and int(count) > 0 and (int(count) <= NODE or int(count) % NODE == 0)
    if not whole or kind not in PLACES:
        raise UserError(
            f"gpus = {text!r}: must be NUMBERxKIND, as 8xH100: up to {NODE} or whole nodes of {NODE}, of "
            f"{', '.join(PLACES)}"
        )
    return Cluster(int(count), kind)


def _number(own: Mapping[str, str], key: str, default: float) -> float:
    try:
        value = float(own.get(key, default))
    except ValueError:
        value = -1
    whole = "a number above 0" if key == "price" else "a whole number above 0"
    if not 0 < value < math.inf or (key != "price" and value != int(value)):
        raise UserError(f"{key} = {own[key]!r} (command line): must be {whole}")
    return value


def published_name(path: str) -> str | None:
    """The published shape that a Hub id, or the name itself, begins with."""
    name = path.rpartition("/")[2].lower()
    return max((known for known in PUBLISHED if name.startswith(known.lower())), key=len, default=None)


def read_shape(config: Config) -> tuple[ModelConfig, Path | None]:
    """The model's shape, its experts as they are kept in memory, and its folder, if there is one."""
    name = published_name(config.model.path)
    folder = None
    if name is not None and (is_hub_id(config.model.path) or config.model.path == name):
        shape = parse_model_config(PUBLISHED[name], Path(name))
        packed = "mxfp4" in FAMILIES[shape.architecture].quantised
    elif is_hub_id(config.model.path):
        raise UserError(
            f"model.path = {config.model.path}: nothing is fetched for a plan; give a folder with its config.json and "
            f"tokenizer, or one of {', '.join(PUBLISHED)}"
        )
    else:
        folder = resolve_model_path(config.model.path, cache_folder(config))
        shape = read_model_config(folder)
        packed = shape.experts is not None and shape.experts.packed
    return with_experts(shape, config, packed), folder


def stated_tree(lengths: Lengths, objective: str) -> Tree:
    """A row of one pair: both answers once, or a judge's prompt with both, in both orders."""
    prompt, answer = (0,) * lengths.prompt, (0,) * lengths.answer
    if objective == "responses":
        answers = tuple(Completion(branch, 0, answer) for branch in (0, 1))
        return Tree("", prompt, (answer[:-1], answer[:-1]), answers, (Pair(0, 1, 1.0),))
    orders = (2 * answer,) * 2
    verdicts = tuple(Completion(branch, len(orders[0]), (label,)) for branch in (0, 1) for label in (0, 1))
    return Tree("", prompt, orders, verdicts, (Pair(0, 1, 1.0, twin=1), Pair(3, 2, 1.0, twin=0)))


def work_of(trees: Sequence[Tree], pairs: Sequence[int], config: Config, world: int) -> Work:
    """Packs and tokens of the run's steps, from SAMPLED_STEPS of them."""
    steps = plan_steps(pairs, config)
    sample = steps[:: -(-len(steps) // SAMPLED_STEPS)]
    batches: list[Batch] = []
    tokens = busy = 0
    for members in sample:
        chosen = [trees[i] for i in members]
        tokens += sum(tree.tokens for tree in chosen)
        # The ranks' shares as dpo/step.py cuts them; only one rank's are looked into, the first's, which has the most.
        batches += pack_share(chosen, config.pack.tokens, 0, world)
        busy += min(world, len(chosen))
    packs, count = [pack for batch in batches for pack in batch.packs], len(sample)
    return Work(
        steps=len(steps),
        packs=len(packs) / count,
        tokens=tokens / count,
        together=max(len(batch.packs) for batch in batches),
        busy=busy / (world * count),
        epochs=config.train.epochs,
        pack=max(packs, key=lambda pack: pack.layout.tokens),
    )


# --- what comes of it -------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """Bytes that a GPU receives over each of its links."""

    node: float
    across: float
    host: float

    def time_s(self, kind: str) -> float:
        """Seconds, all links at once."""
        place = PLACES[kind]
        return max(self.node / place.node, self.across / place.across, self.host / place.host) / 1e9 / LINK_SHARE


@dataclass(frozen=True)
class Plan:
    """A run on a cluster: bytes of a GPU, seconds of a step."""

    cluster: Cluster
    state: State
    trial: Trial
    work: Work
    offload: bool = False

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part at the peak: while the head runs, or while layers are differentiated."""
        state, trial = self.state, self.trial
        kept = {} if self.offload else dict(zip(State._fields[:3], map(float, state[:3]), strict=True))
        kept["activations"] = trial.kept * self.work.together
        head = {"head's logits": trial.head, "gathered": float(state.root)}
        backward = {
            "recomputed, temporary, gradients of a layer": max(trial.last, trial.backward) - trial.kept,
            "gathered: root, a layer, the next": float(state.root + 2 * state.largest),
            "gradients being summed": float(state.reducing),
        }
        return kept | max(head, backward, key=lambda parts: sum(parts.values()))

    @property
    def peak_gib(self) -> float:
        return sum(self.memory.values()) / 2**30

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.cluster.usable_gib

    def forward(self) -> Moved:
        """Of a pack's forward: every unit is gathered."""
        return self._moved(sum(unit.gathered for unit in self.state.units), 0)

    def backward(self) -> Moved:
        """Of its backward: gathered again, and gradients summed."""
        units = self.state.units
        return self._moved(sum(unit.gathered * unit.backward for unit in units), sum(unit.reduced for unit in units))

    def _moved(self, gathered: int, reduced: int) -> Moved:
        """Parts lie in one node, or fill nodes (a ring a network card, along its rail); copies in other nodes."""
        parts, copies = self.state.parts, self.cluster.gpus // self.state.parts
        node = min(parts, NODE)
        whole = gathered + reduced
        summed = 2 * reduced / parts * (copies - 1) / copies  # over the copies: there and back
        inside = whole * (parts - 1) / parts
        across = whole * (parts - node) / parts / node
        if self.cluster.gpus > NODE:
            across += summed
        else:
            inside += summed
        return Moved(inside, across, whole / parts if self.offload else 0.0)

    @property
    def step_s(self) -> float:
        kind = self.cluster.kind
        pack = max(self.trial.forward_s, self.forward().time_s(kind))
        pack += max(self.trial.backward_s, self.backward().time_s(kind))
        bandwidth = HOST_BANDWIDTH if self.offload else GPUS[kind].memory_tbps * 1e12
        return self.work.packs * pack + self.state.gradients / 4 * ADAM_BYTES / bandwidth

    @property
    def hours(self) -> float:
        """Of training and, once, the reference's forwards; not of loading, judging and saving."""
        forward_s = max(self.trial.forward_s, self.forward().time_s(self.cluster.kind))
        return self.work.steps * (self.step_s + self.work.packs * forward_s / self.work.epochs) / 3600

    @property
    def mfu(self) -> float:
        """Model FLOP of what is trained, without padding and what is computed again, of the peak's."""
        flop = self.trial.flop * self.work.tokens / self.work.pack.layout.tokens
        return flop / (self.step_s * self.cluster.gpus * GPUS[self.cluster.kind].peak_tflops * 1e12)


def planner(config: Config, lengths: Lengths) -> tuple[str, Callable[[Cluster], Plan]]:
    """(what the rows are, the plan of the configuration on a cluster)."""
    shape, folder = read_shape(config)
    dtype = DTYPES.get(config.dtype, torch.bfloat16)
    if folder is None:
        trees: Sequence[Tree] = [stated_tree(lengths, config.objective)] * lengths.pairs
        rows = f"{lengths.pairs} rows as stated, prompt {lengths.prompt}, answer {lengths.answer} tokens"
    else:
        trees = read_inputs(config, "cpu").train_trees
        rows = f"{len(trees)} training rows, counted"
    pairs = [len(tree.pairs) for tree in trees]
    trials: dict[tuple[str, bool], Trial] = {}  # the same on any number of GPUs but one

    def plan(cluster: Cluster) -> Plan:
        world = cluster.gpus
        work = work_of(trees, pairs, config, world)
        if (cluster.kind, world > 1) not in trials:
            trials[cluster.kind, world > 1] = try_pack(shape, config, dtype, world, work.pack, cluster.kind)
        state = state_of(shape, config, dtype, world)
        return Plan(cluster, state, trials[cluster.kind, world > 1], work, config.fsdp.offload and world > 1)

    return rows, plan


def smallest(plan: Callable[[Cluster], Plan], kind: str) -> Plan | None:
    """The plan of the smallest cluster that fits, of powers of two up to MOST GPUs."""
    whole = 0.0
    for count in (2**n for n in range(MOST.bit_length())):
        if whole <= count * PLACES[kind].memory_gib:  # else not even the parameters, evenly cut
            found = plan(Cluster(count, kind))
            if found.fits:
                return found
            whole = 0.0 if found.offload else whole or found.state.kept / 2**30
    return None


# --- how it is told ---------------------------------------------------------------------------------------------------


def told(plan: Plan, price: float) -> list[str]:
    """The plan in lines; `price` is of a GPU and hour, 0 = not known."""
    cluster, work = plan.cluster, plan.work
    ways = plan.forward(), plan.backward()
    node, across, host = (work.packs * sum(bytes_) / 2**30 for bytes_ in zip(*ways, strict=True))
    links, computing = sum(way.time_s(cluster.kind) for way in ways), plan.trial.forward_s + plan.trial.backward_s
    bound = "links" if links > computing else "computing"
    cost = f", {plan.hours * cluster.gpus * price:,.0f} at {price:g} a GPU-hour" if price else ""
    idle = f"; {1 - work.busy:.0%} of the GPUs idle: raise train.batch_pairs" if work.busy < 1 else ""
    return [
        f"{cluster.gpus} x {cluster.kind}: {'fits' if plan.fits else 'DOES NOT FIT'}, {plan.peak_gib:.1f} of "
        f"{cluster.usable_gib:.1f} GiB a GPU ({RESERVED:.0%} of {PLACES[cluster.kind].memory_gib:g} left free)",
        *(f"  {size / 2**30:8.2f}  {part}" for part, size in plan.memory.items()),
        f"step: {plan.step_s:.2f} s, {work.packs:.1f} packs a GPU ({work.tokens:,.0f} tokens in all{idle}), "
        f"MFU {plan.mfu:.1%}",
        f"  a pack computes {computing:.2f} s, moves {links:.2f} s; bound by {bound}",
        f"  a GPU receives {node:.1f} GiB in its node, {across:.1f} GiB from others"
        + (f", {host:.1f} GiB from its host" if plan.offload else ""),
        f"run: {work.steps} steps, {work.steps * work.tokens:,.0f} tokens, {plan.hours:.1f} h{cost}",
    ]


ROWS = {  # what the table asks of each model; MXFP4 of those that are published so
    "LoRA, MXFP4": ["model.experts=packed"],
    "LoRA and experts, MXFP4": ["model.experts=packed", EXPERTS],
    "LoRA": ["model.experts=plain"],
    "all": ["lora.rank=0"],
}


def table(argv: Sequence[str], kind: str, lengths: Lengths) -> Iterator[str]:
    """A line a model and way to train: the smallest cluster of a kind that fits, and what comes of it there."""
    yield "| model | trains | smallest | GiB a GPU | step, s | MFU | hours |"
    yield "|---|---|---|---|---|---|---|"
    taken = [argument for argument in argv if not argument.startswith(("model.path=", "lora.targets="))]
    for name in TABLE:
        for trains, settings in ROWS.items():
            if "MXFP4" in trains and not name.startswith("gpt-oss"):
                continue
            plan = smallest(planner(load_config([*taken, f"model.path={name}", *settings]), lengths)[1], kind)
            figures = f"none up to {MOST} | | | |"
            if plan is not None:
                figures = f"{plan.cluster.gpus} | {plan.peak_gib:.0f} | {plan.step_s:.1f} | {plan.mfu:.0%} |"
                figures += f" {plan.hours:.1f}"
            yield f"| {name} | {trains} | {figures} |"


def main(argv: list[str]) -> int:
    """The command line: 0 where the run fits, 1 where it does not, else exit_code's."""
    return exit_code(lambda: tell(argv), argv, USAGE)


def tell(argv: list[str]) -> int:
    """Print the plan, or the table, that is asked for."""
    names = ("gpus", "price", "pairs", "prompt", "answer")
    own = {key: value for key, _, value in (argument.partition("=") for argument in argv) if key in names}
    rest = [argument for argument in argv if argument.partition("=")[0] not in (*names, "--table")]
    cluster = parse_cluster(own.get("gpus", "8xH100"))
    lengths = Lengths(*(int(_number(own, key, default)) for key, default in Lengths()._asdict().items()))
    price = _number(own, "price", 1) if "price" in own else 0.0
    if "--table" in argv:
        for line in table(rest, cluster.kind, lengths):
            print(line, flush=True)
        return 0
    config = load_config(rest)
    rows, plan = planner(config, lengths)
    asked = plan(cluster)
    least = smallest(plan, cluster.kind)
    print(f"{config.exp}: {config.model.path}, {rows}; modelled, not measured", *told(asked, price), sep="\n")
    if least is not None and least.cluster != cluster:
        print("smallest that fits:", *told(least, price), sep="\n")
    elif least is None:
        print(f"no cluster of up to {MOST} {cluster.kind} fits")
    return 0 if asked.fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
