"""Long Range Arena: one encoder interface, six tasks, comparison tables that can be trusted."""

from importlib.util import find_spec as _find_spec

__version__ = "0.1.0"

if _find_spec("lra.tasks") is None:
    raise ImportError(
        "lra/architectures, lra/kernels and lra/tasks are symbolic links and this checkout has none of them: "
        "clone with `git -c core.symlinks=true clone`, or install the wheel instead of running from the checkout"
    )
