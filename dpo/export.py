"""Merge what was trained into one Hugging Face folder, and check that it computes the same.

Letters: `T` tokens, `V` vocabulary. Read next: models/lora.py, dpo/checkpoint.py (a run's own export).
"""

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpo.checkpoint import load
from dpo.config import Config
from dpo.distributed import Ranks, full_parameters
from dpo.inputs import DTYPES, cache_folder
from dpo.judge.attacks import SEEN
from dpo.policy import load_policy, with_adapter
from dpo.runs import read_config
from dpo.verdict_files import SHAPES, write_verdict_files
from models.checkpoint import ADAPTER_CONFIG, save_folder, whole_tensor
from models.decoder import Decoder, load_decoder, next_token_logits
from models.errors import UserError, exit_code
from models.files import read_json_object
from models.gguf_import import resolve_model_path
from models.lora import merged_weights

ROWS, TOKENS = 4, 64
NOISE = 4  # what was written may differ by so many times what its rounding errors do with signs drawn at random


def _read_source(source: Path, base: str) -> tuple[Config, Path | None]:
    """The configuration whose policy `source` holds, its model.path set to `base` if given; a run's best weights."""
    if (source / ADAPTER_CONFIG).is_file():
        base = base or str(read_json_object(source / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if not base:
            raise UserError(f"{source / ADAPTER_CONFIG}: names no base model; say which by --base MODEL_FOLDER")
        model = {"path": base, "adapter": str(source)}
        return with_adapter(Config.model_validate({"exp": "export", "model": model})), None
    best = source / "checkpoints" / "best"
    if not (source / "config.json").is_file() or not best.is_dir():
        raise UserError(
            f"{source}: holds nothing to merge; give a run's folder with trained weights (checkpoints/best), "
            f"or a peft adapter's ({ADAPTER_CONFIG})"
        )
    config = read_config(source)
    # An adapter that the run began with is in its best weights.
    own = config.model.model_copy(update={"path": base or config.model.path, "adapter": ""})
    return config.model_copy(update={"model": own}), best


@torch.no_grad()
def fixed_logits(model: Decoder) -> Tensor:
    """Logits [rows * T, V] of a few rows of tokens, the same ones for the same vocabulary."""
    draw = random.Random("export")
    rows = [[draw.randrange(model.config.vocab) for _ in range(TOKENS)] for _ in range(ROWS)]
    return torch.cat([next_token_logits(model, row).double() for row in rows])


class Checked(NamedTuple):
    """Largest differences of a logit to the unmerged policy's, computed in fp32 (fp64 for fp32)."""

    written: float  # of what was written, read again
    allowed: float  # NOISE times that of the merged weights with errors as large as those of rounding, signs at random
    trained: float  # of the base model: where `written` is not far below it, the dtype has rounded the training away


def merge(source: Path, out: Path, *, base: str = "", dtype: torch.dtype = torch.bfloat16) -> Checked:
    """Write the merged weights of a run or a peft adapter to `out` in `dtype`, whole or not at all."""
    if out.exists():
        raise UserError(f"--out {out}: is there already; choose another place, or remove it")
    config, best = _read_source(source, base)
    folder = resolve_model_path(config.model.path, cache_folder(config), "--base")

    exact = torch.float32 if dtype is torch.bfloat16 else torch.float64
    alone = Ranks(0, 1, torch.device("cpu"))
    unmerged = load_policy(config, folder, exact, alone)
    if best is not None:
        load(best, unmerged, alone)
    truth, merged = fixed_logits(unmerged), merged_weights(unmerged, full_parameters(unmerged))

    def published(folder: Path) -> Decoder:
        return load_decoder(folder, weight_dtype=exact, compute_dtype=exact)

    def gap(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max())

    model, generator = published(folder), torch.Generator().manual_seed(0)
    trained = gap(fixed_logits(model), truth)
    for name, weight in model.named_parameters():
        weight.copy_(whole_tensor(merged, name))
    unrounded = fixed_logits(model)
    for weight in model.parameters():
        signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
        weight.add_(signs * (weight.to(dtype) - weight))
    allowed = NOISE * gap(fixed_logits(model), unrounded)
    save_folder(out, merged, folder, dtype=dtype)
    try:
        found = Checked(gap(fixed_logits(published(out)), truth), allowed, trained)
        if not found.written <= allowed:
            raise UserError(
                f"{out}: the merged model's logits differ by {found.written:.3g} from the unmerged ones, more than the "
                f"{allowed:.3g} allowed; it was removed. Try --dtype fp32; if that fails too, report it"
            )
    except BaseException:  # Ctrl-C too: what is not checked does not stay
        shutil.rmtree(out)
        raise
    told = [source / "export" / "model" / name for name in ("README.md", SEEN)]  # a run's card and attacks
    for path in (path for path in (*told, source / SEEN) if path.is_file()):
        shutil.copyfile(path, out / path.name)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line: 0 when the model is written and checked, else exit_code's."""
    parser = argparse.ArgumentParser(prog="python -m dpo.export", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a run folder, or a peft adapter's")
    parser.add_argument("--base", default="", help="the base model; by default the one that the source names")
    parser.add_argument("--out", type=Path, help="folder to write; by default SOURCE/merged")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (%(default)s)")
    parser.add_argument("--verdicts", choices=SHAPES, help="write the run's verdicts in this shape instead")
    asked = parser.parse_args(arguments)
    out = asked.out or asked.source / "merged"

    def command() -> None:
        if asked.verdicts:
            print("\n".join(map(str, write_verdict_files(asked.source, asked.verdicts))))
            return
        found = merge(asked.source, out, base=asked.base, dtype=DTYPES[asked.dtype])
        print(
            f"{out}: logits of merged and unmerged differ by at most {found.written:.3g} (allowed {found.allowed:.3g}; "
            f"the training moved them by {found.trained:.3g})"
        )

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
