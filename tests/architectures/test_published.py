"""Published weights through `lra import`: tensors of the authors' code under the names that they publish them with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_near, everything, golden
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lra
from lra.architectures._stack import Stack
from lra.cli.app import app
from lra.encoder import Encoder, Published
from lra.errors import UserError

FLOAT64 = torch.float64


def stored(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The stored parameters of a layer, their names behind `prefix`."""
    return {prefix + key.removeprefix("param."): t for key, t in golden(name).items() if key.startswith("param.")}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64)


def saved(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def mamba_file(name: str, layers: int = 2) -> dict[str, Tensor]:
    """A model of `layers` times the stored mixer, as state-spaces/mamba and Hugging Face publish one."""
    torch.manual_seed(0)
    tensors = {"backbone.embedding.weight": drawn(7, 3), "lm_head.weight": drawn(7, 3)}
    for i in range(layers):
        tensors |= stored(name, f"backbone.layers.{i}.mixer.")
    width = len(tensors["backbone.layers.0.mixer.out_proj.weight"])
    norms = {f"backbone.layers.{i}.norm.weight": drawn(width) for i in range(layers)}
    return tensors | norms | {"backbone.norm_f.weight": drawn(width)}


@pytest.mark.parametrize(
    ("architecture", "name", "own"),
    [
        ("mamba", "mamba_block", {}),
        ("mamba2", "mamba2_mixer", {"n_groups": 2}),
        ("mamba2", "mamba2_mixer_nogroup", {"n_groups": 1}),
    ],
)
def test_mamba_equals_the_published_one(architecture: str, name: str, own: dict[str, Any], tmp_path: Path) -> None:
    tensors, g = mamba_file(name), golden(name)
    encoder = lra.import_weights(architecture, saved(tmp_path, tensors), length=32, dtype=FLOAT64, **own)
    x = g["x"]
    assert isinstance(encoder, Stack)
    small = 1e-3 * x  # small enough that the epsilon of the norms matters
    for name, norm in (("layers.0.norm", encoder.blocks[0].norm), ("norm_f", encoder.norm)):
        expected = nn.functional.rms_norm(small, x.shape[-1:], tensors[f"backbone.{name}.weight"], eps=1e-5)
        assert_near(norm(small), expected, name)
    for layer in encoder.blocks:
        assert_near(layer.mixer(x, everything(x)), g["y"], "mixer")
    own_names = {name for name, _ in encoder.named_parameters()}
    assert own_names == {
        n.removeprefix("backbone.").replace("norm_f", "norm") for n in tensors if "layers" in n or "_f" in n
    }
    assert_close(encoder.get_parameter("layers.1.norm.weight"), tensors["backbone.layers.1.norm.weight"], 0)


def test_s4d_equals_the_published_one(tmp_path: Path) -> None:
    g, first = golden("s4d_minimal"), "s4_layers.0."
    width = len(g["param.D"])
    tensors = {f"{first}kernel.{name}": g[f"param.{name}"] for name in ("log_dt", "log_A_real", "A_imag")}
    tensors |= {
        f"{first}kernel.C": torch.view_as_real(g["param.C"]), f"{first}D": g["param.D"],
        f"{first}output_linear.0.weight": g["param.out.weight"].unsqueeze(-1),
        f"{first}output_linear.0.bias": g["param.out.bias"],
        "norms.0.weight": drawn(width), "norms.0.bias": drawn(width), "encoder.weight": drawn(width, 1),
        "decoder.bias": drawn(2),
    }  # fmt: skip
    encoder = lra.import_weights("s4d", saved(tmp_path, tensors), length=g["x"].shape[-1], dtype=FLOAT64)
    mixer, x = encoder.get_submodule("layers.0.mixer"), g["x"].mT
    assert_near(mixer(x, everything(x)), g["y"].mT, "y")
    y = nn.functional.layer_norm(x + g["y"].mT, (width,), tensors["norms.0.weight"], tensors["norms.0.bias"])
    assert_near(encoder(x, everything(x)), y, "a norm after the layer")


def rwkv_file() -> dict[str, Tensor]:
    tensors = stored("rwkv4_block", "rwkv.blocks.0.")
    return tensors | {
        "rwkv.ln_out.weight": drawn(8),
        "rwkv.ln_out.bias": drawn(8),
        "rwkv.embeddings.weight": drawn(5, 8),
    }


@pytest.mark.parametrize(
    ("name", "architecture", "own", "tolerance"),
    [
        ("mamba_model", "mamba", {"block": {"norm_eps": 1e-6}}, 1e-6),
        ("llama_model", "transformer", {"n_heads": 2, "block": {"norm_eps": 1e-6}}, 1e-6),
        ("bert_model", "transformer", {"n_heads": 2}, 1e-12),
    ],
)
def test_whole_models_equal_those_of_hugging_face(
    name: str, architecture: str, own: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    """Two of them compute in float32 inside, which 1e-6 allows for. The stored Mamba has norms of epsilon 1e-6."""
    g = golden(name)
    encoder = lra.import_weights(architecture, saved(tmp_path, stored(name)), length=16, dtype=FLOAT64, **own)
    real = g["in.mask"]
    assert_near(encoder(g["x"], real)[real], g["y"][real], "y", tolerance)


RELEASED = {
    "rwkv.": "", "attention": "att", "feed_forward": "ffn", "pre_ln": "ln0", "embeddings": "emb",
    "time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r",
}  # fmt: skip


@pytest.mark.parametrize("released", [False, True])
def test_rwkv4_equals_the_published_one(released: bool, tmp_path: Path) -> None:
    """Both spellings of the names; a block with its norms, then the last norm."""
    tensors, g = rwkv_file(), golden("rwkv4_block")
    gain, offset = tensors["rwkv.ln_out.weight"], tensors["rwkv.ln_out.bias"]
    for theirs, name in RELEASED.items() if released else ():
        tensors = {key.replace(theirs, name): t for key, t in tensors.items()}
    encoder = lra.import_weights("rwkv4", saved(tmp_path, tensors), length=16, dtype=FLOAT64)
    y = nn.functional.layer_norm(g["y"], (8,), gain, offset)
    assert_near(encoder(g["x"], everything(g["x"])), y, "y")


def llama_file(biases: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = stored("mha_llama", "model.layers.0.self_attn.")
    if not biases:
        tensors = {name: t for name, t in tensors.items() if not name.endswith("bias")}
    layer = "model.layers.0."
    return tensors | {
        f"{layer}input_layernorm.weight": drawn(12), f"{layer}post_attention_layernorm.weight": drawn(12),
        f"{layer}mlp.gate_proj.weight": drawn(20, 12), f"{layer}mlp.up_proj.weight": drawn(20, 12),
        f"{layer}mlp.down_proj.weight": drawn(12, 20), "model.norm.weight": drawn(12),
        "model.embed_tokens.weight": drawn(3, 12), "lm_head.weight": drawn(3, 12),
    }  # fmt: skip


def test_transformer_equals_the_published_llama(tmp_path: Path) -> None:
    """Its attention is that of Hugging Face; the rest of a layer is written out."""
    tensors, g = llama_file(biases=True), golden("mha_llama")
    encoder = lra.import_weights(
        "transformer", saved(tmp_path, tensors), n_heads=int(g["cfg.H"]), length=32, dtype=FLOAT64
    )
    x, layer = g["x"], "model.layers.0."
    mixer = encoder.get_submodule("layers.0.mixer")
    assert_near(mixer(x, everything(x)), g["y"], "attention")

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[name]

    h = x + mixer(normed(x, f"{layer}input_layernorm.weight"), everything(x))
    z = normed(h, f"{layer}post_attention_layernorm.weight")
    up, down = z @ tensors[f"{layer}mlp.up_proj.weight"].T, tensors[f"{layer}mlp.down_proj.weight"].T
    h = h + (nn.functional.silu(z @ tensors[f"{layer}mlp.gate_proj.weight"].T) * up) @ down
    assert_near(encoder(x, everything(x)), normed(h, "model.norm.weight"), "y")


def test_a_bias_that_a_llama_does_not_have_is_zero(tmp_path: Path) -> None:
    encoder = lra.import_weights("transformer", saved(tmp_path, llama_file(biases=False)), n_heads=3, length=8)
    assert not encoder.get_parameter("layers.0.mixer.qkv.bias").any()
    assert encoder.get_parameter("layers.0.mixer.qkv.weight").dtype == torch.float32


def changed(tensors: dict[str, Tensor], **edits: Tensor | None) -> dict[str, Tensor]:
    """Tensors whose names contain a key replaced by a value, or left out where it is None."""
    out = {}
    for name, t in tensors.items():
        key = next((key for key in edits if key in name), None)
        if key is None:
            out[name] = t
        elif (value := edits[key]) is not None:
            out[name] = value
    return out


@pytest.mark.parametrize(
    ("edits", "extra", "says"),
    [
        ({"A_log": None}, {}, r"unknown tensor 'backbone\.layers\.0\.mixer\.A_log' in .*model\.safetensors"),
        ({"norm_f": None}, {}, r"unknown tensor 'backbone\.norm_f\.weight'.*; did you mean 'backbone\."),
        ({"x_proj": None}, {}, r"has nothing for layers\.0\.mixer\.x_proj\.weight and 1 others of mamba"),
        (
            {"x_proj": drawn(3, 5)}, {},
            r"layers\.0\.mixer\.x_proj\.weight of .* make a tensor of shape \(3, 5\); .* of mamba has \(10, 12\)",
        ),
        ({}, {"backbone.extra": drawn(1)}, r"has backbone\.extra, which mamba has no place for; --ignore"),
        ({}, {"backbone.layers.0.mixer.E": drawn(1)}, r"unknown parameter 'layers\.0\.mixer\.E' in this mamba"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    edits: dict[str, Tensor | None], extra: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, changed(mamba_file("mamba_block"), **edits) | extra)
    with pytest.raises(UserError, match=says):
        lra.import_weights("mamba", file, length=32)


def test_tensors_may_be_left_out(tmp_path: Path) -> None:
    file = saved(tmp_path, mamba_file("mamba_block") | {"backbone.extra": drawn(1)})
    lra.import_weights("mamba", file, length=32, ignore=["*.extra"])


@pytest.mark.parametrize(
    ("architecture", "own", "says"),
    [
        (
            "gru",
            {"length": 8},
            r"gru has no map for published weights; these have: mamba, mamba2, rwkv4, s4d, transformer$",
        ),
        ("mamba", {}, r"does not tell length of mamba; give it: --set length=\.\.\."),
        ("mamba2", {"length": 8}, r"does not tell n_groups of mamba2"),
        ("transformer", {"length": 8}, r"does not fit transformer: neither a Llama .* nor a BERT"),
        ("mamba", {"length": 8, "state": 4}, r"unknown argument 'state' in mamba; did you mean 'state_size'"),
        ("mama", {"length": 8}, r"unknown architecture 'mama'; did you mean 'mamba'"),
    ],
)
def test_what_is_asked_for_must_exist(architecture: str, own: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        lra.import_weights(architecture, saved(tmp_path, mamba_file("mamba_block", 1)), **own)


class Marked:
    """Something that is no tensor."""


def test_files_of_torch_are_read_without_running_code(tmp_path: Path) -> None:
    tensors, file = mamba_file("mamba_block", 1), tmp_path / "weights.pt"
    torch.save({"state_dict": tensors}, file)
    lra.import_weights("mamba", file, length=8)
    torch.save({"state_dict": tensors, "code": Marked()}, file)
    with pytest.raises(
        UserError, match=r"weights\.pt holds more than tensors, which is not read: .*; save its state d"
    ):
        lra.import_weights("mamba", file, length=8)
    torch.save([1], file)
    with pytest.raises(UserError, match=r"weights\.pt holds list; expected a state dict"):
        lra.import_weights("mamba", file, length=8)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.npz", b"", r"model\.npz is no file of weights; its name ends in \.safetensors, \.pt"),
        ("model.safetensors", None, r"model\.safetensors does not exist"),
        ("model.safetensors", b"no weights", r"model\.safetensors cannot be read as weights"),
        ("model.pt", b"no weights", r"model\.pt "),
    ],
)
def test_other_files_are_refused(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        lra.import_weights("mamba", tmp_path / name, length=8)


class Gated(nn.Module):
    """A layer of one's own, with a map for weights that carry other names."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        names: dict[str, tuple[str, ...]] = {"layers.0.mixer.inner.map.weight": ("net.kernel",)}
        for part in ("layers.0.norm", "layers.0.ffn_norm", "norm"):
            names |= {f"{part}.weight": (), f"{part}.bias": ()}
        names |= {f"layers.0.ffn.{part}.{kind}": () for part in ("up", "down") for kind in ("weight", "bias")}
        return Published({"d_model": len(tensors["net.kernel"]), "n_layers": 1}, names, {"*.map.weight": torch.t})


def test_a_layer_of_ones_own_brings_its_own_map(tmp_path: Path) -> None:
    kernel = torch.randn(3, 3)
    encoder = lra.import_weights(Gated, saved(tmp_path, {"net.kernel": kernel}), length=4)
    assert_close(encoder.get_parameter("layers.0.mixer.inner.map.weight"), kernel.T, 0)


def test_command_writes_an_encoder_that_is_read_again(tmp_path: Path) -> None:
    file, folder = saved(tmp_path, mamba_file("mamba2_mixer")), tmp_path / "mine"
    arguments = ["import", "mamba2", str(file), "--out", str(folder), "--set", "n_groups=2", "--set", "length=16"]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "would write" in dry.output
    assert not folder.exists()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "d_model 8, n_layers 2" in done.output
    assert json.loads((folder / "config.json").read_text())["source"] == "model.safetensors"
    same, x = lra.load_encoder(folder), torch.randn(2, 9, 8)
    assert isinstance(same, Encoder)
    again = lra.import_weights("mamba2", file, n_groups=2, length=16)
    assert torch.equal(same(x, everything(x)), again(x, everything(x)))
    assert CliRunner().invoke(app, arguments).exit_code == 2
    with pytest.raises(UserError, match="is not an imported encoder of this version"):
        lra.load_encoder(tmp_path)
