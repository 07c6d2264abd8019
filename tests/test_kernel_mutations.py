# ruff: noqa: E501 (a mutation a line)
"""Every Triton kernel broken on purpose, in copies of kernels/: the claims of tests/kernel_claims*.py catch each.

Run as a script it is the driver: it imports once, and forks for every mutation, since a broken kernel may crash.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2

# The claims that run between guards, and run so first: what writes beyond a buffer is to meet them, not the heap.
GUARDED = "padding_is_inert_and_nothing_is_written_beyond_a_buffer"
GUARDED_ROWS = "rows_ignore_their_padding_and_write_nothing_beyond_a_buffer"

# (file, claims that run: a list or a single one, what is replaced, by what); all occurrences are replaced
MUTATIONS = {
    "nothing broken": ("triton_parts", "PAIRS", "", ""),
    # tiles and partial softmaxes
    "columns of a tile unmasked": ("triton_parts", "LINEAR", " & (c < columns - column)", ""),
    "rows of a tile unmasked": ("triton_parts", "LINEAR", "mask=(r < rows - row) & ", "mask="),
    "32-bit offset of a tile": ("triton_parts", "offsets_beyond_two_to_the_31_are_reached", "tl.cast(row, tl.int64) * stride", "row * stride"),
    "bf16 multiplied as bits": ("triton_parts", "linear_error_is_at_most_twice_torchs_in_bf16_at_odd_sizes", "    if INTERPRET:\n        return tl.dot", "    if False:\n        return tl.dot"),
    "bf16 cut off": ("triton_parts", "rows_of_gradients_are_rounded_to_nearest", "if INTERPRET and dtype", "if False and dtype"),
    "ln 2 in one piece": ("triton_parts", "LINEAR", " - k * LN2_LOW", ""),
    "-inf kept as a scale": ("triton_parts", "LINEAR", 'tl.where(k == float("-inf"), 0.0, k)', "k"),
    "tanh's series for all": ("triton_parts", "LINEAR", "tl.abs(x) < 0.3", "tl.abs(x) < 30"),
    "maximum of parts begins at 0": ("triton_parts", "LINEAR", 'top = tl.full([BT], float("-inf")', "top = tl.full([BT], 0.0"),
    "last part left out": ("triton_parts", "LINEAR", "range(0, parts)", "range(0, parts - 1)"),
    "parts not scaled": ("triton_parts", "LINEAR", "(scale * s_part)", "s_part"),
    "entropy of parts not shifted": ("triton_parts", "LINEAR", "(u_part + s_part.to(tl.float64) * shift)", "u_part"),
    "sums of rows beyond T written": ("triton_parts", GUARDED, "tl.store(S_OUT + t, s, mask=inside)", "tl.store(S_OUT + t, s)"),
    # linear_forward
    "words beyond V counted": ("linear_triton", "LINEAR", 'z = tl.where(v[None, :] < V, z, float("-inf"))', "z = z"),
    "tiles of words rounded down": ("linear_triton", "LINEAR", "tl.cdiv(T, BT), tl.cdiv(V, BV)", "tl.cdiv(T, BT), V // BV"),
    "one program too few": ("linear_triton", "LINEAR", '(triton.cdiv(T, tile["BT"]) * parts,)', '(triton.cdiv(T, tile["BT"]) * parts - 1,)'),
    "group of rows not cut at the end": ("linear_triton", "LINEAR", "tl.minimum(tiles_t - first, GROUP)", "GROUP"),
    "maxima of rows beyond T written": ("linear_triton", GUARDED, "tl.store(K + part, k, mask=t < T)", "tl.store(K + part, k)"),
    "target's logit by every tile": ("linear_triton", "LINEAR", " & (y >= v0) & (y < v0 + BV)", ""),
    "softcap's slope forgotten": ("linear_triton", "LINEAR", "e *= 1 - capped * capped", "e *= 1"),
    "target counted twice": ("linear_triton", "LINEAR", "rounded(tl.where(hit, 0.0, e)", "rounded(e"),
    "exponentials beyond V or T written": ("linear_triton", GUARDED, "mask=(t[:, None] < T) & (v[None, :] < V)", "mask=t[:, None] < T + 9"),
    "32-bit offset of exponentials": ("linear_triton", "offsets_beyond_two_to_the_31_are_reached", "E + tl.cast(t0, tl.int64) * e_stride", "E + t0 * e_stride"),
    # linear_hidden_grad
    "tiles of columns rounded down": ("linear_triton", "LINEAR", "tiles_n = tl.cdiv(D, BN)", "tiles_n = tl.maximum(D // BN, 1)"),
    "scale of the wrong tile": ("linear_triton", "LINEAR", "tl.cast(v // BV, tl.int64)", "tl.cast(v // BK, tl.int64)"),
    "tiles not brought to one scale": ("linear_triton", "LINEAR", "power_of_two(k - k_row)[:, None]", "1.0"),
    "gradient beyond T or D written": ("linear_triton", GUARDED, "mask=(t[:, None] < T) & (n[None, :] < D)", "mask=t[:, None] < T"),
    # linear_weight_grad, linear_target_rows
    "words always of the first scale": ("linear_triton", "LINEAR", "    K += tl.cast(v0 // BV, tl.int64) * T\n", ""),
    "chunks not added": ("linear_triton", "chunks_of_rows_and_recomputing_change_no_bits", "acc += tl.load(out, mask=inside, other=0.0)", "acc += 0"),
    "weight gradient beyond V written": ("linear_triton", GUARDED, "(v[:, None] < V) & (n[None, :] < D)", "(n[None, :] < D)"),
    "only the first of equal targets": ("linear_triton", "LINEAR", "here = tl.load(Y + i, mask=i < T, other=-1)", "here = y - 1"),
    "every one of equal targets anew": ("linear_triton", "LINEAR", "if y != before", "if y >= 0"),
    "target rows beyond D written": ("linear_triton", GUARDED, "tl.store(out, acc, mask=n < D)", "tl.store(out, acc)"),
    # row_forward, row_backward
    "row's maximum begins at 0": ("row_triton", "ROWS", 'top = tl.full([], float("-inf")', "top = tl.full([], 0.0"),
    "logits beyond V read": ("row_triton", "ROWS", 'mask=v < V, other=float("-inf")', 'mask=v < V + 9, other=float("-inf")'),
    "blocks of a row rounded down": ("row_triton", "ROWS", "tl.cdiv(V - p * BLOCKS * BV, BV)", "(V - p * BLOCKS * BV) // BV"),
    "one span too few": ("row_triton", "ROWS", 'parts = triton.cdiv(V, tile["BV"] * SPAN_BLOCKS)', "parts = 1"),
    "32-bit offset of a row": ("row_triton", "ROWS", "tl.cast(t, tl.int64) * l_stride", "t * l_stride"),
    "32-bit offset of a row's gradient": ("row_triton", "ROWS", "tl.cast(t, tl.int64) * o_stride", "t * o_stride"),
    "blocks of a row not rescaled": ("row_triton", "ROWS", "s = scale * s + ", "s = s + "),
    "entropy of blocks not shifted": ("row_triton", "ROWS", "(u + s * shift)", "u"),
    "first word never a target": ("row_triton", "ROWS", "(p == 0) & (y >= 0)", "(p == 0) & (y > 0)"),
    "row's gradient beyond V written": ("row_triton", GUARDED_ROWS, "INTERPRET), mask=v < V)", "INTERPRET))"),
    "target's own gradient forgotten": ("row_triton", "ROWS", "tl.where(v == y, at_target, out)", "out"),
    "ignored rows of nan": ("row_triton", "ROWS", "tl.where(factor == 0, 0.0, ", "tl.where(False, 0.0, "),
    # pair_forward, pair_backward
    "tokens of the next completion summed": ("preference_triton", "PAIRS", "tl.load(X + at, mask=at < end, other=0.0)", "tl.load(X + at)"),
    "tokens of the next completion written": ("preference_triton", "PAIRS", "+ g, mask=at < end)", "+ g)"),
    "rejected pulled like chosen": ("preference_triton", "PAIRS", "tl.where(rejected == 1, -g, g)", "g"),
    "halves read as interleaved": ("preference_triton", "PAIRS", "first + 1 if INTERLEAVED else b + B", "first + 1"),
    "label smoothing left out of the slope": ("preference_triton", "PAIRS", "(sigma - (1 - smoothing))", "(sigma - 1)"),
    "reference forgotten": ("preference_triton", "PAIRS", "ratio -= segment_sum(REFERENCE, begin, end, BT)", "ratio -= 0"),
    # dequantise_blocks
    "halves of a byte the other way round": ("mxfp4_triton", "PACKED", "value_of(codes & 15, scale), value_of(codes >> 4, scale)", "value_of(codes >> 4, scale), value_of(codes & 15, scale)"),
    "-0 without its sign": ("mxfp4_triton", "PACKED", "tl.where(code >= 8, -0.5, 0.5) * scale", "0.5 * tl.where(code >= 9, -scale, scale)"),
    "subnormal half read as a normal": ("mxfp4_triton", "PACKED", "tl.where(small < 2, small, ", "tl.where(small < 1, small, "),
    "values beyond the last block written": ("mxfp4_triton", "PACKED", "to(OUT.dtype.element_ty), mask=inside[:, None])", "to(OUT.dtype.element_ty))"),
    "overflow at large margins": ("preference_triton", "PAIRS", "tail = tl.exp(-tl.abs(x))", "tail = tl.exp(-x)"),
}  # fmt: skip


def mutant(folder: Path, number: int, file: str, old: str, new: str) -> ModuleType:
    """A copy of the package with the replacement made, imported under a name of its own."""
    name = f"mutant{number}"
    shutil.copytree(ROOT / "kernels", folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    for path in (folder / name).glob("*.py"):
        text = path.read_text()
        if path.stem == file and old:
            text = text.replace(old, new)
        path.write_text(text.replace("from kernels", f"from {name}"))
    k = importlib.import_module(name)
    for module in ("linear_logprobs", "preference_loss"):
        setattr(k, f"{module}_module", importlib.import_module(f"{name}.{module}"))
    return k


def survives(folder: Path, number: int) -> str:
    """Nothing where every claim holds for the mutation, else the claim that failed."""
    from tests import kernel_claims, kernel_claims_rows

    file, group, old, new = list(MUTATIONS.values())[number]
    k = mutant(folder, number, file, old, new)
    claims = getattr(kernel_claims, group, None) or getattr(kernel_claims_rows, group)
    for claim in claims if isinstance(claims, list) else [claims]:
        try:
            claim(k)
        except Exception:
            return claim.__name__
    return ""


def drive() -> None:
    """Prints, as JSON, what caught each mutation: a claim, "a crash", or "" where nothing did."""
    import torch
    import triton  # noqa: F401

    from tests import kernel_claims_rows  # noqa: F401

    torch.set_num_threads(1)
    caught = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, name)
        waiting, running = list(enumerate(MUTATIONS)), {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number, title = waiting.pop(0)
                child = os.fork()
                if child == 0:
                    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                    (folder / f"{number}.txt").write_text(survives(folder, number))
                    os._exit(0)
                running[child] = (number, title)
            child, _ = os.wait()
            number, title = running.pop(child)
            said = folder / f"{number}.txt"
            caught[title] = said.read_text() if said.exists() else "a crash"
    print(json.dumps(caught))


@pytest.fixture(scope="module")
def caught() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment = os.environ | threads | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("title", MUTATIONS)
def test_is_caught(title, caught):
    file, _, old, _ = MUTATIONS[title]
    assert old in (ROOT / "kernels" / f"{file}.py").read_text(), "the mutation breaks nothing any more: rewrite it"
    assert bool(caught[title]) == (title != "nothing broken"), caught[title]


if __name__ == "__main__":
    drive()
