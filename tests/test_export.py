"""dpo/export.py: what it writes is the run's policy, also in transformers, and it refuses what is not."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reference import Runs, runs  # noqa: F401

from dpo import export
from models.tiny import write_tiny_model

SMALL = ("objective=responses", "judge.rows=2", "judge.blind_control=false", "train.lr=1e-2", "lora.rank=2")


def trained(runs: Runs, *settings: str) -> Path:  # noqa: F811
    runs.results(*SMALL, *settings)
    return (runs.folder / "runs" / "smoke" / "latest").resolve()


@pytest.mark.parametrize("settings", [("lora.dora=true",), ("lora.rank=0",)], ids=["dora", "all weights"])
def test_a_run_is_merged_into_what_its_own_export_holds(runs, capsys, settings):  # noqa: F811
    folder = trained(runs, *settings)
    assert export.main([str(folder)]) == 0
    said = capsys.readouterr().out
    written, allowed, moved = (float(number) for number in re.findall(r"(?:at most|allowed|them by) ([\d.e-]+)", said))
    assert str(folder / "merged") in said and written < allowed and written < moved / 2
    merged, own = (load_file(folder / name / "model.safetensors") for name in ("merged", "export/model"))
    assert merged.keys() == own.keys() and {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], own[name]) for name in own)


def test_an_adapter_is_merged_over_its_base_and_opens_in_transformers(runs, capsys):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    adapter = trained(runs, "lora.dora=true", "lora.rslora=true") / "export" / "adapter"
    out = runs.folder / "out"
    assert export.main([str(adapter), "--out", str(out), "--dtype", "fp32"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(
        next((runs.folder / "cache" / "models").iterdir()), dtype=torch.float32
    )
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        start = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
        unmerged = adapted(tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(tokens).logits
        truth = adapted.double()(tokens).logits
    bound = 2 * (unmerged - truth).norm()
    assert (merged - truth).norm() <= bound < 0.01 * (start - truth).norm()
    with pytest.raises(SystemExit, match="0"):
        export.main(["--help"])
    assert "--dtype" in capsys.readouterr().out


def test_a_merge_that_is_wrong_is_refused_and_removed(runs, capsys, monkeypatch):  # noqa: F811
    folder = trained(runs)
    right = export.merged_weights

    def wrong(model, tensors):
        layer = "model.layers.1.mlp.down_proj"
        return dict(right(model, tensors)) | {f"{layer}.weight": tensors[f"{layer}.weight"]}  # without its update

    monkeypatch.setattr(export, "merged_weights", wrong)
    assert export.main([str(folder)]) == 2
    assert "allowed" in capsys.readouterr().err and not (folder / "merged").exists()


def test_a_merge_that_is_stopped_before_its_check_is_removed(runs, monkeypatch):  # noqa: F811
    folder, read = trained(runs), export.load_decoder

    def stopped(of, **dtypes):
        if of == folder / "merged":
            raise KeyboardInterrupt
        return read(of, **dtypes)

    monkeypatch.setattr(export, "load_decoder", stopped)
    assert export.main([str(folder)]) == 130 and not (folder / "merged").exists()


def test_a_users_mistakes_are_named(runs, capsys, tmp_path):  # noqa: F811
    folder = trained(runs)
    (folder / "merged").mkdir()
    assert export.main([str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert export.main([str(tmp_path)]) == 2
    assert "holds nothing to merge" in capsys.readouterr().err
    assert export.main([str(folder), "--out", str(tmp_path / "out"), "--base", "nowhere"]) == 2
    assert "--base = 'nowhere'" in capsys.readouterr().err
    write_tiny_model(tmp_path / "wider", changes={"head_dim": 32})
    assert export.main([str(folder), "--out", str(tmp_path / "out"), "--base", str(tmp_path / "wider")]) == 2
    assert "not the tensors that this model trains" in capsys.readouterr().err
    config = folder / "export" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base": "'))
    assert export.main([str(config.parent), "--out", str(tmp_path / "out")]) == 2
    assert "base" in capsys.readouterr().err and not (tmp_path / "out").exists()
