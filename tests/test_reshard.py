"""dpo/checkpoint.py on ranks: saved by four, loaded by two, one and four again; the export; what stops them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved import saved_tensors

ROOT = Path(__file__).parents[1]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("settings", [["lora.rank=2", "lora.dora=true"], pytest.param([], marks=pytest.mark.long)])
def test_what_four_ranks_saved_two_one_and_four_load_to_the_same_bits_and_export_alike(tiny_folder, tmp_path, settings):
    """Adapters of rank 2: two of four ranks hold no part of them, and yet the export is whole (accelerate#4206)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/forked_ranks.py", str(tmp_path), str(tiny_folder), *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(path.name for path in (tmp_path / "four").glob("shard-*")) == [
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in range(1, 5)
    ]
    four, *others = (saved_tensors(tmp_path / name) for name in ("four", "two", "one", "again"))
    assert len(four) % 4 == 0 and any(value.any() for name, value in four.items() if name.endswith("exp_avg"))
    for other in others:  # weights, two moments and the count of steps
        assert four.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in four.items())

    one = tmp_path / "one-export"
    assert len(list((one / "model").glob("model-*-of-*"))) > 2
    for name in ("two-export", "again-export"):
        for kind in ("model", "adapter") if settings else ("model",):
            whole, mine = exported(one / kind), exported(tmp_path / name / kind)
            assert whole.keys() == mine.keys() and all(torch.equal(value, mine[key]) for key, value in whole.items())
            for file in (path for path in (one / kind).iterdir() if path.suffix == ".json"):
                assert file.read_bytes() == (tmp_path / name / kind / file.name).read_bytes()
    assert not list(tmp_path.rglob(".*"))
