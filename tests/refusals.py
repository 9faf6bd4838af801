"""Arguments that a constructor refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refuses(make: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    """`refuses(make, **given)(*cases)` is a test: make(**given), changed by each (wrong, says) of `cases`, raises a
    ValueError that matches `says`."""

    def checked(*cases: tuple[dict[str, Any], str]) -> Any:
        @pytest.mark.parametrize(("wrong", "says"), cases)
        def test(wrong: dict[str, Any], says: str) -> None:
            with pytest.raises(ValueError, match=says):
                make(**{**given, **wrong})

        return test

    return checked
