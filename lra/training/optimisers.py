"""Optimiser and schedule by name, with the encoder's own parameter groups."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from lra.config.sections import Optim
from lra.encoder import Encoder
from lra.errors import UserError, unknown

KEYS = ("lr", "lr_scale", "weight_decay")
PLACES = {
    "adamw": ("torch.optim", "AdamW"),
    "adam": ("torch.optim", "Adam"),
    "sgd": ("torch.optim", "SGD"),
    "adafactor": ("torch.optim", "Adafactor"),
    "muon": ("torch.optim", "Muon"),
    "lion": ("lion_pytorch", "Lion"),
    "sophia": ("sophia_opt", "SophiaG"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),
}
SHARDED = "_fsdp_wrapped_module."
PACKAGES = {"lion_pytorch": "lion-pytorch", "sophia_opt": "sophia-opt", "schedulefree": "schedulefree"}


def parameter_groups(
    model: nn.Module, encoder: Encoder, recipe: Optim, dimensions: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Parameters grouped by (rate, weight decay): the encoder's patterns first, else the recipe's, with decay on
    matrices only unless it says "all". dimensions: of each parameter by name, where a strategy has flattened them.

    Raises UserError for a pattern that matches no parameter or a setting that does not exist.
    """
    patterns = dict(encoder.optim)
    matched = dict.fromkeys(patterns, False)
    for pattern, settings in patterns.items():
        wrong = [key for key in settings if key not in KEYS]
        if wrong:
            raise UserError(f"{type(encoder).__name__}.optim[{pattern!r}] has {wrong[0]!r}; one of {', '.join(KEYS)}")
    inside = {id(p): name.replace(SHARDED, "") for name, p in encoder.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for full, parameter in model.named_parameters():
        name = inside.get(id(parameter))
        hits = [p for p in patterns if name is not None and fnmatch(name, p)]
        for pattern in hits:
            matched[pattern] = True
        own = patterns[hits[0]] if hits else {}
        rate = min(own.get("lr", recipe.lr), recipe.lr * own.get("lr_scale", 1.0))
        decays = recipe.decay == "all" or (dimensions or {}).get(full.replace(SHARDED, ""), parameter.ndim) >= 2
        decay = own.get("weight_decay", recipe.weight_decay if decays else 0.0)
        groups.setdefault((rate, decay), []).append(parameter)
    idle = [p for p, hit in matched.items() if not hit]
    if idle:
        raise UserError(f"{type(encoder).__name__}.optim[{idle[0]!r}] matches no parameter")
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build(
    model: nn.Module, encoder: Encoder, recipe: Optim, labels: int = 1, dimensions: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`. Raises UserError for one that is not installed or refuses.

    labels: that Sophia's estimate of the curvature is a mean over, by which it scales it.
    """
    groups = parameter_groups(model, encoder, recipe, dimensions)
    make = located(recipe.name)
    if recipe.name == "muon":
        return _muon(make, groups, encoder, recipe)
    if recipe.name == "sophia":
        make = _with_batch_size(make, labels)
    return _made(make, recipe.name, groups, recipe)


def _with_batch_size(kind: Any, labels: int) -> Any:
    class Sophia(kind):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure, bs=labels)

    return Sophia


def located(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class behind a name of `OPTIMISERS` or `module:attr`. Raises UserError."""
    module, attribute = PLACES[name] if name in PLACES else name.rsplit(":", 1)
    try:
        place = importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.partition(".")[0])
        remedy = f"; `pip install {package}`" if package and error.name == module.partition(".")[0] else ""
        raise UserError(f"optim.name {name!r} needs {module}, which cannot be imported: {error}{remedy}") from None
    if not hasattr(place, attribute):
        classes = [n for n, c in vars(place).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
        raise unknown("optimiser", attribute, classes, where=module)
    return getattr(place, attribute)


def _made(
    make: Callable[..., Any],
    name: str,
    groups: list[dict[str, Any]],
    recipe: Optim,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    taken = inspect.signature(make).parameters
    arguments = {"lr": recipe.lr, **(recipe.options if options is None else options)}
    if "betas" in taken:
        arguments.setdefault("betas", recipe.betas)
    if name == "schedule_free":
        arguments.setdefault("warmup_steps", recipe.warmup)
    try:
        made = make(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name {name!r} refuses its arguments: {error}; see optim.options") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"optim.name {name!r} is not a torch.optim.Optimizer")
    return made


def _muon(make: Callable[..., Any], groups: list[dict[str, Any]], encoder: Encoder, recipe: Optim) -> Combined:
    """Muon on the encoder's matrices without settings of their own, AdamW on everything else, as its authors use it."""
    special = {n for n, _ in encoder.named_parameters() if any(fnmatch(n, p) for p in encoder.optim)}
    matrices = {id(p) for n, p in encoder.named_parameters() if p.ndim == 2 and n not in special}
    hidden: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        for kept, wanted in ((hidden, True), (rest, False)):
            params = [p for p in group["params"] if (id(p) in matrices) is wanted]
            if params:
                kept.append(group | {"params": params})
    if not hidden:
        raise UserError("optim.name 'muon' turns matrices, and this encoder has none without settings of their own")
    plain = _made(torch.optim.AdamW, "adamw", rest, recipe, options={}) if rest else None
    return Combined([_made(make, "muon", hidden, recipe), *([plain] if plain else [])])


class Combined(torch.optim.Optimizer):
    """Several optimisers as one, each over its own parameters."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        # the very dictionaries of the parts, so that a schedule reaches them
        self.param_groups = [g for part in parts for g in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


class Plateau:
    """Multiplier of the rate that falls when the accuracy has not risen for some validations."""

    def __init__(self, recipe: Optim) -> None:
        self.shrink, self.patience = recipe.plateau_factor, recipe.plateau_patience
        self.scale, self.best, self.waited = 1.0, -math.inf, 0

    def seen(self, accuracy: float) -> None:
        """After each validation."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.shrink, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def restore(self, state: Mapping[str, float]) -> None:
        self.scale, self.best, self.waited = state["scale"], state["best"], int(state["waited"])


def factor(recipe: Optim, steps: int, plateau: Plateau | None = None) -> Callable[[int], float]:
    """Multiplier of every group's rate at a step: linear warm-up over `warmup` steps, then the schedule."""
    if recipe.name == "schedule_free":
        return lambda step: 1.0

    def at(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = min((step - recipe.warmup) / max(steps - recipe.warmup, 1), 1.0)
        if recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if recipe.schedule == "linear":
            return 1 - done
        if recipe.schedule == "rsqrt":
            return math.sqrt(max(recipe.warmup, 1) / max(step, recipe.warmup, 1))
        return 1.0 if plateau is None else plateau.scale

    return at
