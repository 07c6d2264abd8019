"""The race against TRL on the same pairs: both as whole programs, in turn, one table of ratios a work.

    make bench-trl [PEERS=../shared/peers] [RUNS=3] [DTYPES="bf16 fp32"] [WORKS="hh64 rb24"] [RANKS="0 16"]

PEERS is a folder with trl_dpo.py, which runs TRL's DPOTrainer (model folder and pairs are its arguments) and prints a
line `PEER {json}`, and the works' files. Ours trains fp32 masters, under LoRA a frozen base in the arithmetic's dtype;
TRL trains weights of the dtype given. Set-up and reference: of ours reading, tokenising, model and reference pass, of
TRL all but loading the model. Nothing else may run meanwhile. The tables are kept in experiments/bench/.
Read next: experiments/bench_step.py, whose table of a step follows ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from dpo.inputs import cache_folder, pick_dtype
from dpo.log import cpu_name
from dpo.settings import load_config
from experiments.bench_step import matrix_rate
from kernels.bench import capability
from models.gguf_import import resolve_model_path

ROOT = Path(__file__).resolve().parents[1]

HELD_OUT = {"id": "held-out", "subset": "all", "prompt": "Name the colour of grass.", "rejected": ["A fish."]}
COLUMNS = ("pairs_per_s", "train_s", "setup_and_reference_s", "peak_rss_mib", "step0_loss", "step0_margin")
Figures = dict[str, float]


class Work(NamedTuple):
    """Pinned pairs, and how either program takes them."""

    pairs: str
    rows: str  # the same as rows of several answers; "": made of the pairs
    batch: int  # pairs
    pack_tokens: int
    peer: tuple[str, ...]


WORKS = {
    "hh64": Work("hh64_pairs.jsonl", "", 4, 1984, ()),
    "rb24": Work("rb24_pairs.jsonl", "rb24_rows.jsonl", 12, 1216, ("--pairs=72", "--batch=12", "--max-length=1024")),
}


def write_rows(peers: Path, work: Work, path: Path) -> None:
    """The work in our shape, all of it for training; a run must judge something, so one row is held out."""
    rows = [json.loads(line) for line in (peers / (work.rows or work.pairs)).read_text().splitlines()]
    if not work.rows:
        rows = [
            {"id": f"pair-{number}", "subset": "all", "prompt": row["prompt"]}
            | {side: [row[side][-1]["content"]] for side in ("chosen", "rejected")}
            for number, row in enumerate(rows)
        ]
    rows = [row | {"split": "train"} for row in rows] + [HELD_OUT | {"chosen": ["Green."], "split": "test"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def our_options(work: Work, rows: Path) -> list[str]:
    options = ["exp=responses", f"data.path={rows}", "data.validation_fraction=0", "data.test_fraction=0"]
    options += ["train.select=last", f"train.batch_pairs={work.batch}", f"pack.tokens={work.pack_tokens}"]
    return [*options, "train.lr=1e-6", "judge.blind_control=false"]


def run_ours(work: Work, folder: Path, rank: int, store: Path) -> Figures:
    """Train on the rows; what results.json says."""
    places = [f"run.root={folder / 'runs'}", f"reference.store={store}", f"lora.rank={rank}"]
    command = [sys.executable, "-m", "dpo.train", *our_options(work, folder / "rows.jsonl"), *places]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    run = folder / "runs" / "responses" / "latest"
    results = json.loads((run / "results.json").read_text())
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    train, time_s = results["train"], results["time_s"]
    return {
        "pairs_per_s": train["pairs"] / train["time_s"],
        "train_s": train["time_s"],
        "setup_and_reference_s": time_s["inputs"] + time_s["model"] + time_s["reference"],
        "peak_rss_mib": train["peak_rss_mib"],
        "step0_loss": results["step0_loss"],
        "step0_margin": first["rewards/margins"],
        "reference_s": time_s["reference"],
    }


def run_peer(python: str, peers: Path, model: Path, work: Work, options: list[str]) -> Figures | str:
    """What the peer prints of itself; how it ended, where it is killed (as by the kernel, for memory) or fails."""
    command = [python, str(peers / "trl_dpo.py"), str(model), str(peers / work.pairs), *work.peer, *options]

    def offer() -> None:  # if memory runs out, it is the peer that goes, not this program
        Path("/proc/self/oom_score_adj").write_text("1000")

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=offer)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [""])[-1][:80]
        return "killed (memory?)" if done.returncode in (-9, 137) else f"failed ({done.returncode}): {words}"
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("PEER "))[5:])


def table_of(runs: dict[str, list[Figures | str]]) -> str:
    """Medians, each over the peer's full fine-tuning in its first dtype, and the pairs/s of every run in its turn."""
    medians: dict[str, Figures] = {}
    for name, many in runs.items():
        whole = [run for run in many if isinstance(run, dict)]
        if whole:
            medians[name] = {key: statistics.median(run[key] for run in whole) for key in COLUMNS}
    peer = next((figures for name, figures in medians.items() if name.startswith("TRL full")), None)
    ratios = ("pairs/s over TRL's", "set-up and reference faster", "memory over TRL's")
    heads = (*COLUMNS, *ratios, "pairs/s of each run")
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, many in runs.items():
        if (row := medians.get(name)) is None:
            lines.append(f"| {name} | {many[-1]} |" + " |" * (len(heads) - 1))
            continue
        cells = [f"{row[key]:.4g}" for key in COLUMNS]
        if peer is not None:
            cells.append(f"{row['pairs_per_s'] / peer['pairs_per_s']:.2f}")
            cells.append(f"{peer['setup_and_reference_s'] / row['setup_and_reference_s']:.2f}")
            cells.append(f"{row['peak_rss_mib'] / peer['peak_rss_mib']:.2f}")
        cells += [""] * (len(heads) - 1 - len(cells))
        cells.append(", ".join(f"{run['pairs_per_s']:.3g}" if isinstance(run, dict) else run for run in many))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def race(name: str, asked: argparse.Namespace, model: Path) -> str:
    """The page of one work."""
    work, dtype = WORKS[name], pick_dtype(load_config(["exp=responses"]), "cpu")
    runs: dict[str, list[Figures | str]] = {}
    rates = [matrix_rate(dtype)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(asked.peers, work, folder / "rows.jsonl")
        for number in range(asked.runs):
            for rank in asked.ranks:
                label = f"LoRA r{rank}" if rank else "full"
                store = folder / f"store-{number}-{label}"
                runs.setdefault(f"ours {label}", []).append(run_ours(work, folder, rank, store))
                if rank == asked.ranks[0]:
                    runs.setdefault("ours, a second time", []).append(run_ours(work, folder, rank, store))
                for peer_dtype in asked.dtypes:
                    many = runs.setdefault(f"TRL {label} {peer_dtype}", [])
                    if not many or not isinstance(many[-1], str):  # what was killed once is not tried again
                        options = [f"--dtype={peer_dtype}", f"--lora={rank}"]
                        many.append(run_peer(asked.peer_python, asked.peers, model, work, options))
        rates.append(matrix_rate(dtype))
        command = [sys.executable, "-m", "experiments.bench_step", *our_options(work, folder / "rows.jsonl")]
        step = [
            subprocess.run([*command, f"lora.rank={rank}"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
            for rank in asked.ranks
        ]
    again = [run["reference_s"] for run in runs["ours, a second time"] if isinstance(run, dict)]
    rate = ", ".join(f"{rate / 1e12:.3f}" for rate in rates)
    about = (
        f"# {name}, {asked.runs} run(s), medians\n\n{cpu_name()}, {os.cpu_count()} cores, {capability()}; ours in "
        f"{str(dtype).removeprefix('torch.')}, whose matrix rate was {rate} TFLOP/s before and after; torch "
        f"{torch.__version__}. Reference pass of ours the second time: {statistics.median(again):.2f} s.\n"
    )
    return "\n".join([about, table_of(runs), *step])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-trl" / "bin" / "python"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16], help="of adapters; 0: all weights train")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], help="of the peer; ours takes dtype=auto")
    asked = parser.parse_args()
    model = resolve_model_path("smollm2-135m-instruct", cache_folder(load_config(["exp=responses"])))
    for name in asked.works:
        page = race(name, asked, model)
        (ROOT / "experiments" / "bench" / f"trl_{name}.md").write_text(page)
        print(page)


if __name__ == "__main__":
    main()
