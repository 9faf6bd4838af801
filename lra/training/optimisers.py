"""Optimisers and schedules by name, with the parameter groups of the encoder."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lra.config.sections import Optim
from lra.encoder import Encoder
from lra.errors import UserError, unknown

KEYS = ("lr", "lr_scale", "weight_decay")
CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adam": ("torch.optim", "Adam"),
    "sgd": ("torch.optim", "SGD"),
    "adafactor": ("torch.optim", "Adafactor"),
    "muon": ("torch.optim", "Muon"),
    "lion": ("lion_pytorch", "Lion"),
    "sophia": ("sophia_opt", "SophiaG"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree"),
}
PACKAGES = {"lion_pytorch": "lion-pytorch", "sophia_opt": "sophia-opt", "schedulefree": "schedulefree"}


def parameter_groups(model: nn.Module, encoder: Encoder, recipe: Optim) -> list[dict[str, Any]]:
    """Parameters grouped by learning rate and weight decay.

    The encoder's patterns come first, then the recipe, which decays only matrices unless decay = "all".
    Parameters that are divided among processes have groups of their own: PyTorch does not update them with others.
    Raises UserError for a pattern that matches no parameter or a setting that does not exist.
    """
    patterns = dict(encoder.optim)
    matched = dict.fromkeys(patterns, False)
    for pattern, settings in patterns.items():
        wrong = [key for key in settings if key not in KEYS]
        if wrong:
            raise UserError(f"{type(encoder).__name__}.optim[{pattern!r}] has {wrong[0]!r}; one of {', '.join(KEYS)}")
    encoder_names = {id(p): name for name, p in encoder.named_parameters()}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        name = encoder_names.get(id(parameter))
        hits = [p for p in patterns if name is not None and fnmatch(name, p)]
        for pattern in hits:
            matched[pattern] = True
        own = patterns[hits[0]] if hits else {}
        rate = min(own.get("lr", recipe.lr), recipe.lr * own.get("lr_scale", 1.0))
        decays = recipe.decay == "all" or parameter.ndim >= 2
        decay = own.get("weight_decay", recipe.weight_decay if decays else 0.0)
        groups.setdefault((rate, decay, isinstance(parameter, DTensor)), []).append(parameter)
    unmatched = [p for p, hit in matched.items() if not hit]
    if unmatched:
        raise UserError(f"{type(encoder).__name__}.optim[{unmatched[0]!r}] matches no parameter")
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay, _), params in groups.items()]


def build(model: nn.Module, encoder: Encoder, recipe: Optim, batch_size: int = 1) -> torch.optim.Optimizer:
    """The recipe's optimiser over `parameter_groups`.

    batch_size: examples over which Sophia averages its Hessian estimate (it rescales by this).
    Raises UserError where the optimiser is not installed or rejects its arguments.
    """
    groups = parameter_groups(model, encoder, recipe)
    make = optimizer_class(recipe.name)
    if recipe.name == "muon":
        return _muon(make, groups, encoder, recipe)
    if recipe.name == "sophia":
        make = _with_batch_size(make, batch_size)
    return _instantiate(make, recipe.name, groups, recipe)


def _with_batch_size(sophia: Any, batch_size: int) -> Any:
    class Sophia(sophia):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure, bs=batch_size)

    return Sophia


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class behind a name of `OPTIMISERS` or `module:attribute`. Raises UserError."""
    module_name, attribute = CLASSES[name] if name in CLASSES else name.rsplit(":", 1)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        top = module_name.partition(".")[0]
        remedy = f"; `pip install {PACKAGES[top]}`" if top in PACKAGES and error.name == top else ""
        raise UserError(f"optim.name {name!r} needs {module_name}, which cannot be imported: {error}{remedy}") from None
    if not hasattr(module, attribute):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
        raise unknown("optimiser", attribute, classes, where=module_name)
    return getattr(module, attribute)


def _instantiate(
    make: Callable[..., Any],
    name: str,
    groups: list[dict[str, Any]],
    recipe: Optim,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    accepted = inspect.signature(make).parameters
    arguments = {"lr": recipe.lr, **(recipe.options if options is None else options)}
    if "betas" in accepted:
        arguments.setdefault("betas", recipe.betas)
    if name == "schedule_free":
        arguments.setdefault("warmup_steps", recipe.warmup)
    try:
        optimizer = make(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.name {name!r} rejects its arguments: {error}; see optim.options") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim.name {name!r} is not a torch.optim.Optimizer")
    return optimizer


def _muon(make: Callable[..., Any], groups: list[dict[str, Any]], encoder: Encoder, recipe: Optim) -> Combined:
    """Muon for the encoder's matrices that have no settings of their own, AdamW for everything else, as its authors use
    it."""
    special = {n for n, _ in encoder.named_parameters() if any(fnmatch(n, p) for p in encoder.optim)}
    matrices = {id(p) for n, p in encoder.named_parameters() if p.ndim == 2 and n not in special}
    hidden: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        for selected, is_matrix in ((hidden, True), (rest, False)):
            params = [p for p in group["params"] if (id(p) in matrices) is is_matrix]
            if params:
                selected.append(group | {"params": params})
    if not hidden:
        raise UserError("optim.name 'muon' is for matrices; every matrix of this encoder has settings of its own")
    adamw = [_instantiate(torch.optim.AdamW, "adamw", rest, recipe, options={})] if rest else []
    return Combined([_instantiate(make, "muon", hidden, recipe), *adamw])


class Combined(torch.optim.Optimizer):
    """Several optimisers as one, each over its own parameters."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        # the same dictionaries as those of the parts, so that a schedule changes both
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
    """Learning-rate multiplier that shrinks when validation accuracy has not improved for `patience` validations."""

    def __init__(self, recipe: Optim) -> None:
        self.shrink, self.patience = recipe.plateau_factor, recipe.plateau_patience
        self.scale, self.best, self.waited = 1.0, -math.inf, 0

    def update(self, accuracy: float) -> None:
        """Record the accuracy of one validation."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.shrink, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.scale, self.best, self.waited = state["scale"], state["best"], int(state["waited"])


def factor(recipe: Optim, steps: int, plateau: Plateau | None = None) -> Callable[[int], float]:
    """Learning-rate multiplier as a function of the step: warm-up over `warmup` steps, then the schedule."""
    if recipe.name == "schedule_free":
        return lambda step: 1.0

    def at(step: int) -> float:
        if step < recipe.warmup:
            return ((step + 1) / recipe.warmup) ** recipe.warmup_power
        done = min((step - recipe.warmup) / max(steps - recipe.warmup, 1), 1.0)
        if recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if recipe.schedule == "linear":
            return 1 - done
        if recipe.schedule == "rsqrt":
            return math.sqrt(max(recipe.warmup, 1) / max(step, recipe.warmup, 1))
        return 1.0 if plateau is None else plateau.scale

    return at
