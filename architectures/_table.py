"""Fixed tables, such as sinusoidal positions, that a module computes from its arguments and does not save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Tables(nn.Module):
    """A module with buffers that are in no state dict.

    `to_empty` leaves memory uninitialised, and `load_state_dict` does not fill such a buffer. So a table that was on
    the meta device is computed again as soon as it gets memory.
    """

    def register_table(self, name: str, make: Callable[..., Tensor], *arguments: Any) -> None:
        """Register the buffer make(*arguments), in float32 if it is real. make: a module-level function, so that the
        module can be pickled."""
        self.register_buffer(name, _single(make(*arguments)), persistent=False)
        self.__dict__.setdefault("_tables", {})[name] = make, arguments

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        tables = self.__dict__.get("_tables", {})
        on_meta = [name for name in tables if self.get_buffer(name).is_meta]
        super()._apply(fn, recurse)
        for name in on_meta:
            if not (buffer := self.get_buffer(name)).is_meta:
                make, arguments = tables[name]
                self.register_buffer(name, _single(make(*arguments)).to(buffer), persistent=False)
        return self


def _single(table: Tensor) -> Tensor:
    return table.float() if table.is_floating_point() else table
