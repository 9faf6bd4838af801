"""Two towers: how they meet, the contrastive loss, and recall@k."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_tensors import assert_gradients, assert_near, golden
from test_model import TOKENS, Identity
from tiny_task import Tiny
from torch import Tensor, nn
from torch.nn import functional as F

import lra
from lra.config.recipe import Optim
from lra.errors import UserError
from lra.model import Batch, Classifier, Head
from lra.profiling import flops
from lra.task import SPLITS, Protocol
from lra.tasks.storage import write_documents, write_examples
from lra.towers import FUSIONS, Contrast, CrossFusion, GatedCrossAttention, GatedFusion, Resampler, recall_at
from lra.training import optimisers
from lra.training.trained_run import TrainedRun


def pairs(count: int = 3, length: int = 7) -> Batch:
    """Random pairs of 1 to `length` tokens, classes 0 and 1 in turns."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 11, (count, 2, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 2, 1), generator=generator)
    return Batch(values.masked_fill(~mask, 0), mask, torch.arange(count) % 2, torch.arange(count))


def classifier(pair: str, contrast: Contrast | None = None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Identity(8), TOKENS, 2, 2, "mean", Head(pair=pair), contrast=contrast)


def load(module: nn.Module, g: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill a module by {own name: stored name}; -> own parameter and stored gradient by name."""
    own: dict[str, Tensor] = dict(module.named_parameters())
    stored = {name: g[f"param.{n}"].reshape(own[name].shape) for name, n in names.items() if "+" not in n}
    halves = {name: n.split("+") for name, n in names.items() if "+" in n}
    stored |= {name: g[f"param.{n}"].chunk(2)[int(half)] for name, (n, half) in halves.items()}
    assert stored.keys() == own.keys()
    module.load_state_dict(stored)
    grads = {name: (own[name], g[f"grad.{n}"].reshape(own[name].shape)) for name, n in names.items() if "+" not in n}
    return grads | {name: (own[name], g[f"grad.{n}"].chunk(2)[int(half)]) for name, (n, half) in halves.items()}


def attention(own: str, stored: str) -> dict[str, str]:
    return {
        f"{own}.q_proj.weight": f"{stored}.to_q.weight", f"{own}.k_proj.weight": f"{stored}.to_kv.weight+0",
        f"{own}.v_proj.weight": f"{stored}.to_kv.weight+1", f"{own}.out_proj.weight": f"{stored}.to_out.weight",
    }  # fmt: skip


def norm(own: str, stored: str) -> dict[str, str]:
    return {f"{own}.{part}": f"{stored}.{part}" for part in ("weight", "bias")}


def ffn(own: str, stored: str) -> dict[str, str]:
    maps = {f"{own}.{n}.weight": f"{stored}.{n}.weight" for n in (1, 3)}
    return norm(f"{own}.0", f"{stored}.0") | maps


def test_gated_cross_attention_is_flamingos() -> None:
    """The stored y restricts each text position to the last media item before it, or to none; without locations every
    position sees all. No position looks at another: those of y are taken from one call for each item."""
    g = golden("flamingo_gated_xattn")
    heads, width = int(g["cfg.H"]), int(g["cfg.dh"])
    module = GatedCrossAttention(g["x"].shape[-1], heads, head_dim=width, expand=2).double()
    gates = {"attention_gate": "attn_gate", "ffn_gate": "ff_gate"}
    names = gates | norm("norm", "attn.norm") | attention("attention", "attn") | ffn("ffn", "ff")
    parameters = load(module, g, names)
    assert_near(module(g["x"], g["in.media"].flatten(1, 2)), g["mid.y_no_locations"], "y")
    x, media = g["x"].clone().requires_grad_(), g["in.media"].clone().requires_grad_()
    of_items = [module(x, media[:, item]) for item in range(media.shape[1])]
    choices = torch.stack([x + module.ffn_gate.tanh() * module.ffn(x), *of_items])
    item = g["in.media_locations"].long().cumsum(1)
    y = choices.gather(0, item[None, ..., None].expand(1, *x.shape)).squeeze(0)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, parameters)
    assert_near(media.grad, g["grad.media"], "grad.media")
    with torch.no_grad():
        module.attention_gate.zero_()
        module.ffn_gate.zero_()
    assert torch.equal(module(g["x"], g["in.media"].flatten(1, 2)), g["x"])


def test_resampler_is_flamingos_with_its_gradients() -> None:
    g = golden("perceiver_resampler")
    batch, items, _, d_model = g["x"].shape
    module = Resampler(d_model, 2, latents=3, depth=2, head_dim=4, expand=2).double()
    names = {"latents": "latents"} | norm("norm", "norm")
    for n in range(2):
        names |= norm(f"media_norms.{n}", f"layers.{n}.0.norm_media")
        names |= norm(f"latent_norms.{n}", f"layers.{n}.0.norm_latents")
        names |= attention(f"attentions.{n}", f"layers.{n}.0") | ffn(f"ffns.{n}", f"layers.{n}.1")
    parameters = load(module, g, names)
    x = g["x"].requires_grad_()
    # the stored layer adds an embedding for each of several items first
    embedding = g["param.media_pos_emb"].requires_grad_()
    media = (x + embedding[:items]).flatten(0, 1)
    y = module(media, torch.ones(media.shape[:2], dtype=torch.bool)).unflatten(0, (batch, items))
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, parameters)
    assert_near(embedding.grad, g["grad.media_pos_emb"], "grad.media_pos_emb")


def test_a_tower_asks_the_positions_of_the_other() -> None:
    """CrossFusion, row by row from its equation."""
    torch.manual_seed(0)
    fusion, x, mask = CrossFusion(8).double(), torch.randn(4, 5, 8).double(), pairs(2, 5).mask.flatten(0, 1)
    pool = classifier("cross").pool
    met, pooled = fusion(x, mask, pool), pool(x, mask)
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        keys = fusion.kv_norm(x[other, mask[other]])[None]
        read = fusion.attention(fusion.q_norm(pooled[row])[None, None], keys)[0, 0]
        torch.testing.assert_close(met[row], pooled[row] + read)


@pytest.mark.parametrize("pair", FUSIONS)
def test_towers_meet_in_the_head_and_not_before_where_they_are_compared(pair: str) -> None:
    model, given = classifier(pair), pairs()
    if isinstance(model.fusion, GatedFusion):
        plain = classifier("products")
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fusion.")})
        torch.testing.assert_close(model(given), plain(given), msg="closed gates leave pooling alone")
        with torch.no_grad():
            model.fusion.block.attention_gate.fill_(1.0)
    logits, alone = model.outputs(given)
    changed = given._replace(values=given.values.clone())
    changed.values[:, 1, 0] = (changed.values[:, 1, 0] + 1) % 11
    again, after = model.outputs(changed)
    torch.testing.assert_close(alone[:, 0], after[:, 0])
    assert (logits - again).abs().min() > 1e-6
    longer = given._replace(values=F.pad(given.values, (0, 3)), mask=F.pad(given.mask, (0, 3)))
    torch.testing.assert_close(model(longer), logits, msg="padding is not read")
    full = pairs(1)._replace(mask=torch.ones(1, 2, 7, dtype=torch.bool))
    work = model.cost(7).matmul - 2 * model.encoder.cost(7).matmul
    assert work == pytest.approx(flops.model_flops(model, full).products)


def brute(pooled: Tensor, ids: list[tuple[int, int]], labels: list[int], scale: float) -> float:
    """The definition, pair by pair."""
    total, right = 0.0, [i for i, label in enumerate(labels) if label]
    cosine = F.cosine_similarity(pooled[:, None, 0], pooled[None, :, 1], dim=-1) * scale
    for way in (0, 1):
        for i in right:
            known = {ids[m][1 - way] for m in right if ids[m][way] == ids[i][way]}
            kept = [j for j in range(len(ids)) if j == i or ids[j][1 - way] not in known]
            row = cosine[i] if way == 0 else cosine[:, i]
            total += float(row[kept].logsumexp(0) - row[i]) / 2
    return total / max(len(right), 1)


@pytest.mark.parametrize("labels", [[1, 1, 0, 1, 1, 0], [1] * 6, [0] * 6])
def test_contrastive_loss_is_its_definition(labels: list[int]) -> None:
    """Pairs 0 and 3 share both texts, 0, 1 and 2 the first one; 4 has the second of 1 with a first of its own."""
    ids = [(0, 0), (0, 1), (0, 2), (0, 0), (3, 1), (4, 2)]
    pooled = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = Contrast(0.5, 0.1)(pooled, torch.tensor(ids).unsqueeze(-1), torch.tensor(labels))
    assert loss.item() == pytest.approx(0.5 * brute(pooled.detach(), ids, labels, 10.0), rel=1e-5)
    loss.backward()
    assert pooled.grad is not None
    assert torch.isfinite(pooled.grad).all()
    rows = pooled.grad.abs().sum((1, 2))
    assert (rows > 0).any() == any(labels)


def test_temperature_is_learned_and_the_scale_bounded() -> None:
    model, given = classifier("products", Contrast(1.0, 0.1)), pairs(4)
    assert model.contrast is not None
    grouped = optimisers.parameter_groups(model, model.encoder, Optim(weight_decay=0.1))
    (decay,) = (g["weight_decay"] for g in grouped if any(p is model.contrast.log_scale for p in g["params"]))
    assert decay == 0
    losses = []
    for exponent in (torch.tensor(100.0).log(), torch.tensor(9.0)):
        model.contrast.log_scale.data.copy_(exponent)
        losses.append(model.contrast(model.outputs(given)[1], given.values, given.labels).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_contrast_needs_pairs() -> None:
    for classes, towers in ((2, 1), (3, 2)):
        with pytest.raises(UserError, match="this task has no pairs; set 0"):
            Classifier(Identity(), TOKENS, classes, towers, "mean", contrast=Contrast(1.0, 0.1))


def test_recall_counts_right_answers_among_the_nearest() -> None:
    angles = torch.tensor([0.0, 10.0, 20.0, 30.0, 200.0]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [9.0], [1.0], [1.0], [5.0]])
    index, labels = torch.tensor([[0, 1], [0, 3], [2, 4], [2, 0], [1, 0]]), torch.tensor([1, 1, 1, 0, 0])
    # candidates 0, 1, 3, 4; those of query 0 by distance: 1, 3, 4; of query 2: 1 and 3 (alike), 0, 4
    found = recall_at(embeddings, index, labels, (1, 2, 3, 4, 100))
    assert found == {1: 0.25, 2: 0.5, 3: 0.5, 4: 1.0, 100: 1.0}
    with pytest.raises(ValueError, match="no pair has the label 1"):
        recall_at(embeddings, index, torch.zeros(5), (1,))


class Pairs(Tiny):
    """Do two texts begin with the same token? Documents stand in several pairs."""

    name, classes, towers = "tiny_pairs", 2, 2

    def prepare(self, folder: Path, protocol: Protocol, **_: Any) -> None:
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng(number)
            documents = [random.integers(0, 4, n).astype(np.uint8) for n in random.integers(5, 25, 31)]
            index = random.integers(0, 31, (protocol.counts[split], 2))
            write_documents(folder, split, documents)
            write_examples(folder, split, np.array([documents[a][0] == documents[b][0] for a, b in index]), index)


def test_a_run_learns_its_temperature_and_measures_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    settings = {"model.contrastive": 1.0, "model.temperature": 0.2, "model.pair": "cross", "model.d_model": 8}
    steps = {"train.steps": 4, "train.evaluate_every": 4, "model.n_layers": 1, "data.test_examples": 60}
    run = lra.train(Pairs, "mingru", recipe="quick", overrides=settings | steps)
    assert run.model.contrast is not None
    assert 0 < (run.model.contrast.log_scale.exp() - 5).abs() < 1
    more = run.evaluate().more
    assert more == {f"recall@{k}": share for k, share in run.recall().items()}
    data = run._data("test")
    pooled = dict(zip(data.documents.flatten().tolist(), run.features("test").reshape(-1, 8), strict=True))
    known = torch.from_numpy(np.stack([pooled[n] for n in range(len(pooled))]))
    expected = recall_at(known, data.documents, data.labels, (1, 10, 100))
    assert list(more.values()) == pytest.approx(list(expected.values()))
    with pytest.raises(UserError, match="has no pairs of two classes"):
        TrainedRun(run.model, run.recipe, Tiny(), run.protocol, tmp_path, None, 0).recall()
