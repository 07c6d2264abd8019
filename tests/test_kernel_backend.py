"""kernels/backend.py and kernels/tiles.py: what is chosen, what is said, what is refused. No GPU is needed to ask."""

import importlib.metadata
import json
import logging

import pytest
import torch

from kernels import backend, linear_logprobs, tiles

CUDA, CPU, BF16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16


@pytest.fixture
def fresh():
    """Nothing said and nothing looked up yet."""
    backend._say.cache_clear()
    backend.triton_missing.cache_clear()
    yield
    backend._say.cache_clear()
    backend.triton_missing.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Asks as if on a GPU of the given capability."""

    def be(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return be


@pytest.mark.parametrize("arch", tiles.ARCHS)
def test_every_gpu_of_the_table_has_every_kernel_and_tiles_that_divide(arch):
    assert tiles.TILES[arch].keys() == tiles.TILES["interpret"].keys()
    forward, hidden, weight = (
        tiles.tile_of(arch, f"linear_{name}") for name in ("forward", "hidden_grad", "weight_grad")
    )
    assert forward["BV"] % hidden["BK"] == 0 and forward["BV"] % weight["BM"] == 0


def test_auto_takes_the_faster_by_the_assumed_rates(monkeypatch):
    assert [backend.choose("sm_90", D) for D in (491, 492)] == ["fused", "chunked"]  # 6D / 420 = 6D / 800 + 10 / 3
    assert {backend.choose(arch, D) for arch in tiles.ARCHS for D in (2880, 4096, 5120)} == {"chunked"}  # real heads
    # With our products as fast as the library's, the row kernels' passes decide.
    monkeypatch.setitem(backend.RATES, "sm_90", backend.Rates(800, 800, 3.0))
    assert backend.choose("sm_90", 2880) == "fused"


def test_gpus_run_the_tiles_of_the_nearest_older_kind(gpu):
    for capability, arch in (
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
        ((7, 5), "sm_75"),
    ):
        gpu(*capability)
        assert backend.arch_of(CUDA) == arch


def test_triton_under_another_distributions_name_is_found(fresh, monkeypatch):
    """AMD's wheels of torch bring it as pytorch-triton-rocm or triton-rocm."""
    triton = pytest.importorskip("triton")

    def no_such(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_such)
    assert backend.triton_missing() is None and backend.triton_version() == triton.__version__


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("package", "triton is not installed"),
        ("version", "triton 3.1.0 is older than 3.6"),
        ("gpu", "sm_75"),
        ("dtype", "float64"),
    ],
)
def test_where_triton_cannot_be_had_auto_says_so_once_and_triton_is_an_error(
    fresh, monkeypatch, caplog, gpu, missing, said
):
    gpu(7, 5) if missing == "gpu" else gpu(9, 0)
    if missing == "package":
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    if missing == "version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.1.0")
    dtype = torch.float64 if missing == "dtype" else BF16
    with caplog.at_level(logging.WARNING, logger="kernels"):
        assert [backend.resolve("auto", CUDA, dtype) for _ in range(2)] == ["torch", "torch"]
    (line,) = caplog.messages
    assert "the torch path is used" in line and said in line
    with pytest.raises(ValueError, match="backend='triton' cannot be had: .*"):
        backend.resolve("triton", CUDA, dtype)
    assert said in backend.describe("auto", CUDA, dtype, 1, False)["why"]


def test_on_the_cpu_auto_is_torch_in_silence_and_triton_needs_the_interpreter(monkeypatch, caplog):
    assert backend.resolve("auto", CPU, BF16) == "torch" and not caplog.messages
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="triton")
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton'"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cuda")


def test_the_description_names_path_and_tiles(monkeypatch, gpu):
    gpu(9, 0)
    said = backend.describe("triton", CUDA, BF16, 2880, trainable=True)
    assert said["path"] == "fused" and said["arch"] == "sm_90" and "BT=128" in said["linear_forward"]
    assert said["triton"] == importlib.metadata.version("triton")  # another compiler's bits may differ
    assert "linear_weight_grad" in said and "linear_target_rows" in said
    assert "row_forward" in backend.describe("auto", CUDA, BF16, 2880, trainable=False)
    assert backend.describe("torch", CUDA, BF16, 1, False)["why"] == "asked for"


def test_a_file_of_tiles_overrides_single_entries(monkeypatch, tmp_path):
    other = {"BT": 64, "num_warps": 1, "num_stages": 2}
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_90": {"combine_parts": other}}))
    monkeypatch.setenv("KERNEL_TILES", str(tmp_path / "tiles.json"))
    assert tiles.tile_of("sm_90", "combine_parts") == other
    assert tiles.tile_of("sm_80", "combine_parts") == tiles.TILES["sm_80"]["combine_parts"]


def test_options_that_no_backend_has_are_refused_by_name():
    h, w, y = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0])
    for wrong, named in (
        ({"bias": torch.zeros(3, requires_grad=True)}, "bias requires a gradient"),
        ({"vocab_start": 4}, "vocab_start=4 without vocab_group"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ):
        with pytest.raises(ValueError, match=named):
            linear_logprobs(h, w, y, **wrong)
