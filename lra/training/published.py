"""Published weights: read from their file, checked, loaded into an encoder, and written as a folder."""

from __future__ import annotations

import importlib.util
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lra import __version__, files
from lra.encoder import Encoder, Published
from lra.errors import UserError, brief, unknown
from lra.registry import Constructor, architectures, reference_of

CONFIG, WEIGHTS, FORMAT = "config.json", "model.safetensors", "lra-encoder-1"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")


class _Stored(dict[str, Tensor]):
    """The tensors of a file; a missing one is a UserError that names the nearest."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str) -> None:
        super().__init__(tensors)
        self.file = file

    def __missing__(self, name: str) -> Tensor:
        raise unknown("tensor", name, self, where=self.file)


def read(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a file of torch.save, of which nothing but tensors is unpickled.

    A state dict may stand under one of WRAPPERS. Raises UserError.
    """
    path = Path(file).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file of weights; its name ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} holds more than tensors, which is not read: {reason}; save its state dict") from None
    except Exception as error:  # noqa: BLE001  (safetensors and torch raise exception types of their own)
        raise UserError(f"{path} cannot be read as weights: {error}") from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())):
        raise UserError(f"{path} holds {type(content).__name__}; expected a state dict, names of tensors to tensors")
    return dict(content)


def import_weights(
    architecture: str | type,
    file: str | Path,
    *,
    options: Mapping[str, Any],
    ignore: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> tuple[Encoder, dict[str, Any]]:
    """An encoder with the weights of a published state dict, and the constructor arguments it was built with.

    options: constructor arguments, beside those that the tensors show; of `block`, the fields to change. ignore:
    patterns of tensors to leave out. dtype: of the encoder, float32 unless given. Raises UserError for a tensor that is
    missing, that has the wrong shape or that nothing takes, and for an architecture without a map.
    """
    constructor, name = architectures.get(architecture), reference_of(architecture)
    tensors = _Stored(read(file), str(file))
    published = _map_of(constructor, tensors, {**constructor.preset, **options})
    found = {**published.options, **options}
    if "block" in published.options and isinstance(options.get("block"), Mapping):
        found["block"] = {**published.options["block"], **options["block"]}
    required = [key for key in published.undetermined if key not in options]
    required += [key for key in ("length",) if key not in found]
    if required:
        raise UserError(f"{file} does not tell {required[0]} of {name}; give it: --set {required[0]}=...")
    encoder = cast(Encoder, constructor(**found)).to(dtype)
    with torch.no_grad():
        for parameter, value in _values(encoder, published, tensors, name).items():
            encoder.get_parameter(parameter).copy_(value)
    _check_all_used(published, tensors, ignore, name)
    return encoder.eval(), {**constructor.preset, **found}


def _map_of(constructor: Constructor, tensors: _Stored, given: Mapping[str, Any]) -> Published:
    try:
        return cast(type[Encoder], constructor.cls).published(tensors, given)
    except NotImplementedError:
        mapped = ", ".join(name for name in architectures.names() if _has_map(name))
        raise UserError(f"{constructor.name} has no map for published weights; these have: {mapped}") from None
    except ValueError as error:
        raise UserError(f"{tensors.file} does not fit {constructor.name}: {error}") from None


def _has_map(name: str) -> bool:
    """Whether the file of a registered architecture defines one; no file is imported to tell."""
    family = architectures.family(name)
    spec = importlib.util.find_spec(f"lra.architectures.{family}.{name}") if family else None
    return spec is not None and "def published(" in Path(str(spec.origin)).read_text(encoding="utf-8")


def _values(encoder: Encoder, published: Published, tensors: _Stored, name: str) -> dict[str, Tensor]:
    """Own parameter -> its values, in its shape. Raises UserError."""
    own, values = dict(encoder.named_parameters()), {}
    for parameter, sources in published.names.items():
        if parameter not in own:
            whose = f", which holds {sources[0]} of {tensors.file}" if sources else ""
            raise UserError(f"{unknown('parameter', parameter, own, where=f'this {name}')}{whose}")
        value = _converted(parameter, [tensors[source] for source in sources], published.convert)
        shape = own[parameter].shape
        if value is None:
            value = torch.zeros(shape)
        if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
            raise UserError(
                f"{' and '.join(sources)} of {tensors.file} make a tensor of shape {tuple(value.shape)}; "
                f"{parameter} of {name} has {tuple(shape)}"
            )
        values[parameter] = value.reshape(shape)
    if missing := [parameter for parameter in own if parameter not in values]:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{tensors.file} has nothing for {missing[0]}{more} of {name}")
    return values


def _converted(parameter: str, parts: list[Tensor], convert: Mapping[str, Callable[..., Tensor]]) -> Tensor | None:
    """The value of a parameter made of `parts`; None for 0."""
    for pattern, function in convert.items():
        if fnmatchcase(parameter, pattern):
            return function(*parts)
    return torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)


def _check_all_used(published: Published, tensors: _Stored, ignore: Sequence[str], name: str) -> None:
    used = {source for sources in published.names.values() for source in sources}
    patterns = (*published.ignored, *ignore)
    left = [t for t in tensors if t not in used and not any(fnmatchcase(t, pattern) for pattern in patterns)]
    if left:
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise UserError(f"{tensors.file} has {left[0]}{more}, which {name} has no place for; --ignore leaves it out")


def write(encoder: Encoder, folder: str | Path, architecture: str, options: Mapping[str, Any], source: str) -> Path:
    """Write config.json and model.safetensors to a new folder and return it. Raises UserError."""
    from safetensors.torch import save_file

    path = Path(folder).expanduser()
    check_folder(path)
    content = {
        "format": FORMAT, "library_name": "lra-suite", "lra_version": __version__, "architecture": architecture,
        "options": dict(options), "source": source,
    }  # fmt: skip
    try:
        with files.atomic(path / WEIGHTS) as temporary:
            save_file({name: t.contiguous() for name, t in encoder.state_dict().items()}, temporary)
        with files.atomic(path / CONFIG) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; give a new folder")


def load(folder: str | Path) -> Encoder:
    """The encoder in a folder that `write` wrote. Raises UserError."""
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise ValueError(f"format is {brief(config.get('format'))}; this version reads {FORMAT}")
        weights = load_file(path / WEIGHTS)
        kind = next(iter(weights.values())).dtype
        encoder = cast(Encoder, architectures.get(config["architecture"])(**config["options"])).to(kind)
        encoder.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (safetensors raises an exception type of its own)
        raise UserError(f"{path} is not an imported encoder of this version: {error}") from None
    return encoder.eval()
