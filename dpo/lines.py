"""Items of a file on disk, read one at a time: of one that is not in use only two numbers are held.

No dimension letters. Read next: dpo/rows.py and dpo/tokens.py, whose items these are.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Lines(Sequence[Item]):
    """Items, each read and decoded when it is asked for, in any thread; equal to any sequence of equal ones.

    Not mapped: a mapped page that was touched counts as ours, and letting go of it costs more than reading.
    """

    file: BinaryIO
    spans: NDArray[np.int64]  # [items, 2]: begin and end, bytes
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
        return self.decode(os.pread(self.file.fileno(), end - begin, begin))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, places: Iterable[int]) -> "Lines[Item]":
        """The items at these places, in their order."""
        return Lines(self.file, self.spans[np.fromiter(places, np.int64)], self.decode)
