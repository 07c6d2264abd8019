"""What a row costs: a 2-layer model of width 64 on 1k, 10k and 100k rows, and the time to the first step.

    python -m experiments.bench_rows [--rows 1000 10000 100000] [--runs 1]
    python -m experiments.bench_rows --start-up [--runs 3]      # exp=quickstart, all that can be cached being cached

Each run is the whole command in a process of its own. Pairs/s is of the training alone; the peak is the process's
resident memory. Start-up: from the process's start to the end of its first step, and to its beginning. Nothing else may
run meanwhile. The tables are kept in experiments/bench/. Read next: dpo/inputs.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["exp=smoke", "objective=responses", "train.max_steps=0", "train.batch_pairs=64", "pack.tokens=2048"]
OPTIONS += ["judge.blind_control=false", "log.plots=false", "data.validation_fraction=0", "data.test_fraction=0"]
STARTING = ["exp=quickstart", "log.plots=false"]


def write_rows(path: Path, rows: int) -> None:
    """So many training rows of one pair, all different and equally long, and one row to judge."""
    with open(path, "w") as file:
        for n in range(rows + 1):
            row: dict[str, object] = {"id": f"row-{n:07}", "subset": "sums", "split": "train" if n < rows else "test"}
            row |= {"prompt": f"What is {n:07} + 1?", "chosen": [f"It is {n + 1:07}."], "rejected": [f"It is {n:07}!"]}
            file.write(json.dumps(row) + "\n")


def run_rows(rows: int) -> dict[str, float]:
    """Seconds by stage, pairs/s and peak memory of a run with nothing cached."""
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place) / "rows.jsonl", rows)
        places = [f"data.path={place}/rows.jsonl", f"run.root={place}/runs", f"run.cache={place}/cache"]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dpo.train", *OPTIONS, *places], check=True, cwd=ROOT, stdout=sys.stderr)
        whole_s = time.perf_counter() - begin
        results = json.loads((Path(place) / "runs" / "smoke" / "latest" / "results.json").read_text())
    train, time_s = results["train"], results["time_s"]
    return {
        "inputs_s": time_s["inputs"],
        "reference_s": time_s["reference"],
        "train_s": train["time_s"],
        "whole_s": whole_s,
        "pairs_per_s": train["pairs"] / train["time_s"],
        "ms_per_row": whole_s / rows * 1e3,
        "peak_rss_mib": train["peak_rss_mib"],
    }


def start_up(place: Path) -> dict[str, float]:
    """Seconds from the process's start to the end and the beginning of its first step; it is killed then."""
    begin = time.time()
    process = subprocess.Popen([sys.executable, "-m", "dpo.train", *STARTING, f"run.root={place}"], cwd=ROOT)
    try:
        while not (found := [path for path in place.glob("quickstart/*/metrics.jsonl") if path.stat().st_size]):
            if process.poll() is not None:
                raise SystemExit(f"ended with exit code {process.returncode} before its first step")
            time.sleep(0.002)
        end = found[0].stat().st_mtime
        step_s = json.loads(found[0].read_text().splitlines()[0])["time_s"]
    finally:
        process.kill()
        process.wait()
    return {"first_step_ends_s": end - begin, "first_step_begins_s": end - begin - step_s, "step_s": step_s}


def table_of(name: str, runs: dict[str, list[dict[str, float]]]) -> str:
    """Medians, a line each."""
    columns = list(next(iter(runs.values()))[0])
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label, many in runs.items():
        cells = [f"{statistics.median(run[column] for run in many):,.4g}" for column in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--start-up", action="store_true")
    asked = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    if asked.start_up:
        for _ in range(asked.runs + 1):  # the first fills the caches
            with tempfile.TemporaryDirectory() as place:
                runs.setdefault("exp=quickstart", []).append(start_up(Path(place)))
        runs = {name: many[1:] for name, many in runs.items()}
    else:
        for _ in range(asked.runs):
            for rows in asked.rows:
                runs.setdefault(f"{rows:,}", []).append(run_rows(rows))
    table = f"{os.cpu_count()} cores, medians of {asked.runs} run(s)\n\n"
    table += table_of("start-up" if asked.start_up else "rows", runs)
    (ROOT / "experiments" / "bench" / ("start_up.md" if asked.start_up else "rows.md")).write_text(table)
    print(table)


if __name__ == "__main__":
    main()
