"""A rank that hangs is found and named: a thread of each rank sees where its main thread stands, and all tell.

No dimension letters. Read next: dpo/distributed.py.
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch.distributed as dist

ROOT, WAITING = Path(__file__).parents[1], str(Path(dist.__file__).parent)
OURS = tuple(str(ROOT / package) for package in ("dpo", "models", "kernels"))
LOOKS = 50  # at the main thread, within the limit


def watch(store: dist.PrefixStore, rank: int, world: int, limit_s: float) -> None:
    """In a thread of its own: end this process when its main thread, or another rank's, stands still for `limit_s`.

    A line on stderr then names the ranks for which the others wait. Without the store, torchrun's, it ends at once; no
    one else uses this client of it, whose calls wait for each other.
    """
    look_s = min(2.0, limit_s / LOOKS)
    stood, still_s = _stack(), 0.0  # looks are counted, not the clock: who was stopped may go on
    try:
        while not store.check(["hang"]):
            time.sleep(look_s)
            stands = _stack()
            still_s = still_s + look_s if stands == stood else 0.0
            stood = stands
            if still_s > limit_s:
                store.set("hang", "")
        store.set(f"hang {rank}", _told())
        time.sleep(2 * look_s + 1)  # until each that can has told
        told = {r: store.get(key).decode() for r in range(world) if store.check([key := f"hang {r}"])}
    except dist.DistError:  # torchrun is gone, or all is done
        if not dist.is_initialized():
            return
        os._exit(1)
    if rank == min(told):
        blamed = {r: told.get(r, "does not answer: stopped, or its machine is gone") for r in range(world)}
        waiting = {r: blamed.pop(r) for r, where in told.items() if where.startswith("waits")}
        named = "; ".join(f"rank {r} {where}" for r, where in blamed.items()) or "no rank stands out"
        print(
            f"error: no progress for run.hang_s={limit_s:g} s: {named}; {len(waiting)} of {world} ranks wait: "
            f"{', '.join(sorted(set(waiting.values())))}. All end; torchrun --max-restarts, or run.resume=auto, goes "
            "on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    time.sleep(1)  # torchrun ends all when it sees one end
    os._exit(1)


def _frames() -> list[FrameType]:
    """Of the main thread, the innermost first."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    return [frame for frame, _ in traceback.walk_stack(innermost)] if innermost else []


def _stack() -> list[tuple[object, int]]:
    return [(frame.f_code, frame.f_lasti) for frame in _frames()]


def _told() -> str:
    """Whether the main thread waits for other ranks, and which line of ours it is in."""
    frames = _frames()
    ours = next((f for f in frames if f.f_code.co_filename.startswith(OURS)), None)
    place = f"{Path(ours.f_code.co_filename).relative_to(ROOT)}:{ours.f_lineno}" if ours else "its start or end"
    waits = bool(frames) and frames[0].f_code.co_filename.startswith(WAITING)
    return f"{'waits' if waits else 'stands'} at {place}"
