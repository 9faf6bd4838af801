"""Long Range Arena: a benchmark suite for sequence models with one encoder interface.

The functions of the Python API are imported when they are first used: `import lra` loads neither torch nor pandas.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec as _find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if _find_spec("lra.tasks") is None:
    raise ImportError(
        "lra/architectures, lra/kernels and lra/tasks are symbolic links and this checkout has none of them: "
        "clone with `git -c core.symlinks=true clone`, or install the wheel instead of running from the checkout"
    )

if TYPE_CHECKING:
    from lra.api import check as check
    from lra.api import compare as compare
    from lra.api import create_encoder as create_encoder
    from lra.api import efficiency as efficiency
    from lra.api import import_weights as import_weights
    from lra.api import leaderboard as leaderboard
    from lra.api import list_architectures as list_architectures
    from lra.api import load as load
    from lra.api import load_encoder as load_encoder
    from lra.api import load_task as load_task
    from lra.api import profile as profile
    from lra.api import prune as prune
    from lra.api import quantize as quantize
    from lra.api import scaling as scaling
    from lra.api import train as train
    from lra.data.module import DataModule as DataModule
    from lra.errors import UserError as UserError
    from lra.training.trained_run import TrainedRun as TrainedRun

_MODULES = {
    **dict.fromkeys(
        (
            "check", "compare", "create_encoder", "efficiency", "import_weights", "leaderboard", "list_architectures",
            "load", "load_encoder", "load_task", "profile", "prune", "quantize", "scaling", "train",
        ),
        "lra.api",
    ),
    "DataModule": "lra.data.module",
    "TrainedRun": "lra.training.trained_run",
    "UserError": "lra.errors",
}  # fmt: skip


class _CallablePackage(ModuleType):
    """A package that is also the function of its name in lra.api."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(import_module("lra.api"), self.__name__.rpartition(".")[2])(*arguments, **options)


# `lra.architectures()` and `lra.results()` are functions of the API, and packages that are imported from
for _name in ("lra.architectures", "lra.results"):
    import_module(_name)
    sys.modules[_name].__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lra' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
