"""The race against TRL on the same pairs: both as whole programs, in turn, one table of ratios.

    python experiments/bench_trl.py PEER_SCRIPT PAIRS.jsonl [--peer-python PATH] [--runs 3] [--dtypes bf16 fp32]

PEER_SCRIPT runs TRL's DPOTrainer on PAIRS and prints a line `PEER {json}` (model folder and pairs are its arguments).
PAIRS: {"prompt": [messages], "chosen": [message], "rejected": [message]} a line. Nothing else may run meanwhile.
The table is kept in experiments/bench/. Read next: dpo/train.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpo.inputs import cache_folder  # noqa: E402  (the project need not be installed)
from dpo.settings import load_config  # noqa: E402
from models.gguf_import import resolve_model_path  # noqa: E402

HELD_OUT = {"id": "held-out", "prompt": "Name the colour of grass.", "chosen": ["Green."], "rejected": ["A fish."]}


def write_pairs_as_rows(pairs: Path, rows: Path) -> None:
    """The same pairs in our shape, all of them for training; a run must judge something, so one row is held out."""
    with rows.open("w") as file:
        for number, line in enumerate(pairs.read_text().splitlines()):
            pair = json.loads(line)
            answers = {side: [pair[side][-1]["content"]] for side in ("chosen", "rejected")}
            file.write(
                json.dumps(
                    {"id": f"pair-{number}", "prompt": pair["prompt"], "subset": "all", "split": "train", **answers}
                )
                + "\n"
            )
        file.write(json.dumps({**HELD_OUT, "subset": "all", "split": "test"}) + "\n")


def run_ours(rows: Path, folder: Path, options: list[str]) -> dict[str, float]:
    """Train on the rows with an empty reference store; what results.json says."""
    command = [sys.executable, "-m", "dpo.train", "exp=responses", f"data.path={rows}", f"run.root={folder / 'runs'}"]
    command += [f"reference.store={tempfile.mkdtemp(dir=folder)}", "data.validation_fraction=0", "data.test_fraction=0"]
    command += [
        "train.select=last",
        "train.batch_pairs=4",
        "train.lr=1e-6",
        "lora.rank=0",
        "pack.tokens=960",
        "judge.blind_control=false",
    ]
    subprocess.run([*command, *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "runs" / "responses" / "latest" / "results.json").read_text())
    train = results["train"]
    return {
        "train_s": train["time_s"],
        "pairs_per_s": train["pairs"] / train["time_s"],
        "setup_and_reference_s": results["time_s"]["inputs"]
        + results["time_s"]["model"]
        + results["time_s"]["reference"],
        "peak_rss_mib": train["peak_rss_mib"],
        "step0_loss": results["step0_loss"],
    }


def run_peer(python: str, script: Path, model: Path, pairs: Path, dtype: str) -> dict[str, float]:
    """What the peer prints of itself."""
    output = subprocess.run(
        [python, str(script), str(model), str(pairs), "--dtype", dtype], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("PEER "))[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer_script", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], help="of the peer; ours takes dtype=auto")
    arguments = parser.parse_args()
    model = resolve_model_path("smollm2-135m-instruct", cache_folder(load_config(["exp=responses"])))
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs_as_rows(arguments.pairs, folder / "rows.jsonl")
        for _ in range(arguments.runs):
            runs.setdefault("ours", []).append(run_ours(folder / "rows.jsonl", folder, []))
            for dtype in arguments.dtypes:
                peer = run_peer(arguments.peer_python, arguments.peer_script, model, arguments.pairs, dtype)
                runs.setdefault(f"TRL {dtype}", []).append(peer)
    keys = ("pairs_per_s", "train_s", "setup_and_reference_s", "peak_rss_mib", "step0_loss")
    medians = {name: {key: statistics.median(run[key] for run in many) for key in keys} for name, many in runs.items()}
    lines = [f"{arguments.pairs.name}, {arguments.runs} run(s), medians, {os.cpu_count()} cores", ""]
    lines += [
        "| | " + " | ".join(keys) + " | pairs/s of ours over it | its memory over ours |",
        "|---|" + "---|" * (len(keys) + 2),
    ]
    for name, row in medians.items():
        ratio = medians["ours"]["pairs_per_s"] / row["pairs_per_s"]
        memory = row["peak_rss_mib"] / medians["ours"]["peak_rss_mib"]
        lines.append(
            f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in keys) + f" | {ratio:.2f} | {memory:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    (ROOT / "experiments" / "bench").mkdir(exist_ok=True)
    (ROOT / "experiments" / "bench" / f"trl_{arguments.pairs.stem}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
