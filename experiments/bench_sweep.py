"""What a sweep shares: 12 arms, losses by betas on the same rows, against the same 12 trainings run apart.

    python -m experiments.bench_sweep [--rows 240] [--jobs 1]

Each is the whole command, one after the other; nothing else may run meanwhile. `--jobs` is the sweep's, as many arms at
a time; those run apart are one at a time, with all cores. The sweep begins with an empty cache,
and so does each training run apart (but for the imported model, which all are given): tokens and reference log-probs
are what is shared. The table is kept in experiments/LOG.md. Read next: dpo/sweep.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from dpo.config import Config
from dpo.inputs import cache_folder

ROOT = Path(__file__).resolve().parents[1]
LOSSES, BETAS = ["sigmoid", "ipo", "hinge", "dpo_norm"], [0.1, 0.3, 1.0]
EXPERIMENT = """extends = "questions"
checkable.train_rows = {rows}
checkable.test_rows = 48
"""


def write_experiments(home: Path, rows: int) -> tuple[Path, Path]:
    """Files of one training on `rows` rows, and of the sweep of all of them."""
    alone, swept = home / "alone.toml", home / "swept.toml"
    alone.write_text(EXPERIMENT.format(rows=rows))
    swept.write_text(f"{alone.read_text()}\n[sweep]\nloss.name = {json.dumps(LOSSES)}\nloss.beta = {BETAS}\n")
    return alone, swept


def run(module: str, place: Path, *arguments: str) -> float:
    """Seconds of the command, with the cache and the run folders in `place`."""
    shutil.copytree(cache_folder(Config(exp="x")) / "models", place / "cache" / "models")
    places = [f"run.cache={place / 'cache'}", f"run.root={place / 'runs'}"]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *arguments, *places], check=True, cwd=ROOT, stdout=sys.stderr)
    return time.perf_counter() - begin


def forwards(place: Path) -> list[int]:
    """Completions that the reference was run on, of each finished run in `place`, oldest first."""
    files = sorted(place.rglob("results.json"), key=lambda file: file.stat().st_mtime)
    told = [json.loads(file.read_text()) for file in files]
    return [results["reference"]["misses"] for results in told if "reference" in results]


def main() -> None:
    """The command line: prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        place, arms = Path(home), list(product(LOSSES, BETAS))
        alone, swept = write_experiments(place, asked.rows)
        together_s = run("dpo.sweep", place / "together", f"exp={swept}", f"jobs={asked.jobs}")
        print(
            f"| together | {together_s:,.0f} s | reference run on {forwards(place / 'together')} completions |",
            flush=True,
        )
        apart_s = []
        for number, (loss, beta) in enumerate(arms):
            here = place / str(number)
            apart_s.append(run("dpo.train", here, f"exp={alone}", f"loss.name={loss}", f"loss.beta={beta}"))
            misses = forwards(here)
            shutil.rmtree(here)
        print(f"| {len(arms)} apart | {sum(apart_s):,.0f} s | {misses} completions each |")
        print(f"| together / apart | {together_s / sum(apart_s):.2f} | {os.cpu_count()} cores |")


if __name__ == "__main__":
    main()
