"""Scans of Triton's interpreter over whole tiles.

Its own scan calls the joining function number by number, in the order of the steps. Here a tile takes log2(steps)
calls, each of which doubles the reach of every row; stretches are joined in a tree, as a GPU joins them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np


def _doubling(self: Any, given: tuple[Any, ...]) -> list[Any]:
    """`generic_scan` of Triton's `ScanOps`."""
    kinds = [x.dtype for x in given]

    def tensors(arrays: list[Any]) -> list[Any]:
        return [self.to_tensor(x, kind) for x, kind in zip(arrays, kinds, strict=True)]

    found, reach = [np.moveaxis(x.handle.data, self.axis, 0) for x in given], 1
    while reach < len(found[0]):
        # whole tiles, whose sizes are powers of two: what the first rows join with is thrown away
        earlier = [np.concatenate([x[:reach], x[:-reach]]) for x in found]
        joined = self.combine_fn.fn(*tensors(earlier), *tensors(found))
        joined = joined if isinstance(joined, tuple) else (joined,)
        found = [np.concatenate([x[:reach], y.handle.data[reach:]]) for x, y in zip(found, joined, strict=True)]
        reach *= 2
    return tensors([np.moveaxis(x, 0, self.axis) for x in found])


def over_tiles() -> AbstractContextManager[Any]:
    """The interpreter scans so inside this context."""
    from triton.runtime.interpreter import ScanOps

    return mock.patch.object(ScanOps, "generic_scan", _doubling)
