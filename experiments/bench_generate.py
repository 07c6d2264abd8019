"""Decoding speed of SmolLM2-135M against transformers' generate with its own cache, in turn, in one process.

    python -m experiments.bench_generate [--dtype fp32 bf16] [--rounds 5] [--new-tokens 64]

Three works, greedy, that end at no token: one prompt; 16 judge prompts that share a request (8 pairs of answers, both
orders); 16 that share no more than a pair's two orders do (8 requests). transformers pads the 16 on the left and runs
them as one batch. Decode tokens/s is of the time beyond that of one token; the whole call's has the prompts' forward
too. The share of equal tokens is told: in fp32 it should be all. Nothing else may run meanwhile.
Read next: models/generate.py.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from dpo.config import Config
from dpo.inputs import DTYPES, cache_folder
from dpo.judge.prompts import COMPARE, judge_messages
from kernels.bench import timed_s
from models.decoder import load_decoder
from models.generate import Prompt, generate
from models.gguf_import import resolve_model_path
from models.tokenizer import Tokenizer, load_tokenizer

NUMBERS = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")
REQUEST = " ".join(
    f"{number} pages of a long letter tell of the weather, the harvest, the roads, and who came to the house that "
    "year; the last of them is torn, and somebody has written a recipe for bread on its back."
    for number in NUMBERS
)
ANSWER = "The letter tells of {} storms; the harvest was poor, yet {} guests came before the winter."


def judge_prompts(tokenizer: Tokenizer, requests: list[str]) -> list[Prompt]:
    """A prompt a request: all pairs of answers about it (8 / requests of them) in both orders as branches."""
    prompts = []
    for place, request in enumerate(requests):
        orders = []
        for pair in range(place, 8, len(requests)):
            one, two = (ANSWER.format(NUMBERS[pair].lower(), NUMBERS[pair - n].lower()) for n in (1, 3))
            for first, second in ((one, two), (two, one)):
                messages = judge_messages(({"role": "user", "content": request},), (first, second), COMPARE)
                orders.append(tuple(tokenizer.prompt_ids(messages)))
        shared = len(os.path.commonprefix(orders))
        prompts.append(Prompt(orders[0][:shared], [order[shared:] for order in orders]))
    return prompts


def works(tokenizer: Tokenizer) -> dict[str, list[Prompt]]:
    """The three works."""
    alone = tuple(tokenizer.prompt_ids(({"role": "user", "content": f"{REQUEST}\n\nSum that up."},)))
    return {
        "one prompt": [Prompt(alone)],
        "16 judge prompts, one request": judge_prompts(tokenizer, [f"{REQUEST}\n\nSum that up."]),
        "16 judge prompts, 8 requests": judge_prompts(
            tokenizer, [f"{number}. {REQUEST}\n\nSum that up." for number in NUMBERS]
        ),
    }


def bench(folder: Path, dtype: torch.dtype, rounds: int, new_tokens: int) -> list[str]:
    """A line of the table for each work."""
    ours = load_decoder(folder, weight_dtype=dtype, compute_dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    lines = []
    for name, prompts in works(load_tokenizer(folder)).items():
        whole = [(*prompt.shared, *branch) for prompt in prompts for branch in prompt.branches]
        width = max(map(len, whole))
        ids = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in whole])
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in whole])

        def of_ours(tokens: int, prompts: list[Prompt] = prompts) -> list[list[int]]:
            written = generate(ours, prompts, stops=(), max_new_tokens=tokens)
            return [one.tokens for of_prompt in written for of_branch in of_prompt for one in of_branch]

        def of_theirs(
            tokens: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask, width: int = width
        ) -> list[list[int]]:
            options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return theirs.generate(ids, attention_mask=mask, **options)[:, width:].tolist()

        sides: dict[str, Callable[[int], list[list[int]]]] = {"ours": of_ours, "transformers": of_theirs}
        first, last = (of_side(new_tokens) for of_side in sides.values())  # warms up
        same = sum(a == b for one, two in zip(first, last, strict=True) for a, b in zip(one, two, strict=True))
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for side, run in sides.items():
                first_s, whole_s = (timed_s(partial(run, tokens), "cpu") for tokens in (1, new_tokens))
                rates.setdefault((side, "decode"), []).append(len(whole) * (new_tokens - 1) / (whole_s - first_s))
                rates.setdefault((side, "whole"), []).append(len(whole) * new_tokens / whole_s)
        cells = []
        for part in ("decode", "whole"):
            mine, other = (statistics.median(rates[side, part]) for side in sides)
            cells.append(f"{mine:,.1f} | {other:,.1f} | **{mine / other:.2f}**")
        run_tokens = sum(len(prompt.shared) + sum(map(len, prompt.branches)) for prompt in prompts)
        lines.append(
            f"| {name} | {sum(map(len, whole)):,} | {run_tokens:,} | {' | '.join(cells)} | "
            f"{same / len(whole) / new_tokens:.1%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    asked = parser.parse_args()
    folder = resolve_model_path(asked.model, cache_folder(Config(exp="bench")))
    for dtype in asked.dtype:
        print(
            f"{dtype}, {torch.get_num_threads()} threads, medians of {asked.rounds} in turn, {asked.new_tokens} tokens "
            "each; tokens/s, ours, transformers', ratio\n"
        )
        print(
            "| work | prompt tokens | run by us | decode | theirs | ratio | whole call | theirs | ratio | same tokens |"
        )
        print("|---|" + "---:|" * 9)
        print("\n".join(bench(folder, DTYPES[dtype], asked.rounds, asked.new_tokens)) + "\n", flush=True)


if __name__ == "__main__":
    main()
