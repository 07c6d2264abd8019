"""Items of a file on disk, memory-mapped: of one that is not in use only two numbers are held.

No dimension letters. Read next: dpo/rows.py and dpo/tokens.py, whose items these are.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Lines(Sequence[Item]):
    """Items, each decoded from its bytes in `data` when it is asked for; equal to any sequence of equal ones."""

    data: mmap.mmap
    spans: NDArray[np.int64]  # [items, 2]: begin and end
    decode: Callable[[bytes], Item]

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        begin, end = self.spans[place].tolist()
        line = self.data[begin:end]
        self.data.madvise(mmap.MADV_DONTNEED)  # what is mapped and touched counts as ours until it is let go
        return self.decode(line)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, places: Iterable[int]) -> "Lines[Item]":
        """The items at these places, in their order."""
        return Lines(self.data, self.spans[np.fromiter(places, np.int64)], self.decode)


def mapped(file: BinaryIO) -> mmap.mmap:
    """The whole file; a byte of nothing for an empty one, which cannot be mapped."""
    size = os.fstat(file.fileno()).st_size
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else mmap.mmap(-1, 1)
