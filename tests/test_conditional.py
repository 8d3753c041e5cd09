"""What conditional densities of both kinds promise, whatever the units of their contexts."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch

import pathline as pl
from pathline.errors import ArgumentError, DataError, ShapeError
from pathline.export import export_flow
from pathline.flows import ConditionalOTFlow, PCPMap
from pathline.train import Rows

KINDS = [ConditionalOTFlow, PCPMap]


def pairs(rows=300, seed=0):
    """x (rows, 2) within (-1, 1) x R and contexts (rows, 3) in three units."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(rows, 3)) * [1.0, 100.0, 0.01] + [0.0, -2000.0, 5.0]
    first = np.tanh(0.3 * y[:, 0] + 0.5 * rng.normal(size=rows))
    second = y[:, 1] / 50 + np.sin(2 * y[:, 0]) + rng.normal(size=rows)
    return np.stack([first, second], 1), y


def prepared(kind, x, y, **options):
    """A flow with the coordinates and first weights that training would start from."""
    options = {"width": 16} | options
    flow = kind(x.shape[1], y.shape[1], generator=torch.Generator().manual_seed(0), **options)
    flow = flow.double()
    rows = Rows(np.concatenate([x, y], 1))
    flow.check_rows(rows)
    flow.prepare(rows, torch.Generator().manual_seed(1))
    return flow.requires_grad_(False)


@pytest.mark.parametrize("embedding", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_matter(kind, embedding):
    x, y = pairs()
    factor, shift = np.array([1e-3, 7.0, -50.0]), np.array([1e3, 0.0, -4.0])
    scale, offset = np.array([0.2, 30.0]), np.array([1.0, -500.0])
    here = prepared(kind, x, y, embedding=embedding)
    y, x = torch.from_numpy(y), torch.from_numpy(x)
    moved = y * torch.from_numpy(factor) + torch.from_numpy(shift)
    want = here.log_prob(x, y)
    # a unit that turns round changes the sign of a first weight, so not the second column's
    positive = y * torch.from_numpy(abs(factor)) + torch.from_numpy(shift)
    there = prepared(kind, x.numpy(), positive.numpy(), embedding=embedding)
    torch.testing.assert_close(there.log_prob(x, positive), want, rtol=1e-7, atol=1e-7)
    # what the linear regression makes of contexts does not depend on their signs either
    turned = prepared(kind, x.numpy(), moved.numpy(), embedding=embedding)
    torch.testing.assert_close(
        turned.standardize(x, moved), here.standardize(x, y), rtol=1e-7, atol=1e-7
    )
    other = x * torch.from_numpy(scale) + torch.from_numpy(offset)
    elsewhere = prepared(kind, other.numpy(), y.numpy(), embedding=embedding)
    torch.testing.assert_close(
        elsewhere.log_prob(other, y) + math.log(scale.prod()), want, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_context_says_nothing(kind):
    x, y = pairs()
    y[:, 1] = 3.0
    flow = prepared(kind, x, y)
    assert flow.log_prob(torch.from_numpy(x), torch.from_numpy(y)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_context_or_one_for_each_row(kind):
    x, y = pairs(20)
    flow = prepared(kind, x, y)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    same = y[:1].expand(20, -1)
    torch.testing.assert_close(flow.log_prob(x, y[0]), flow.log_prob(x, same))
    together = flow.log_prob(x, y)
    apart = torch.cat([flow.log_prob(x[i : i + 1], y[i]) for i in range(20)])
    torch.testing.assert_close(together, apart)
    distribution = flow(y[:4].reshape(2, 2, 3))
    assert distribution.batch_shape == (2, 2) and distribution.event_shape == (2,)
    assert distribution.sample((5,)).shape == (5, 2, 2, 2)
    value = x[:4].reshape(2, 2, 2)
    torch.testing.assert_close(distribution.log_prob(value), together[:4].reshape(2, 2))
    torch.manual_seed(3)
    drawn = flow(y[:4]).sample((2000,))
    # each column of contexts has samples of its own: their mean follows the regression
    centre = flow.from_reference(torch.zeros(4, 2), y[:4])
    spread = drawn.std(0)
    assert ((drawn.mean(0) - centre).abs() < spread).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_for_every_context(kind):
    x, y = pairs()
    flow = prepared(kind, x, y, support=[(-1.0, 1.0), (None, None)])
    far = torch.from_numpy(y[:50] * 1.5)
    samples = flow(far).sample((200,))
    assert (samples[..., 0].abs() < 1).all()
    outside = torch.tensor([[1.0, 0.0], [-1.5, 0.0]]).double()
    assert flow.log_prob(outside, far[:2]).isneginf().all()
    with pytest.raises(DataError, match="bounds of column 0"):
        prepared(kind, x * 2, y, support=[(-1.0, 1.0), (None, None)])
    grid = (torch.arange(300).double() + 0.5) / 300
    centre = flow.from_reference(torch.zeros(1, 2), far[0])[0, 1]
    wide = 8 * flow.sample(500, far[0], seed=0)[:, 1].std()
    points = torch.cartesian_prod(2 * grid - 1, centre + wide * (2 * grid - 1))
    mass = flow.log_prob(points, far[0]).exp().sum().item() * 2 * 2 * wide.item() / 300**2
    assert mass == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_on_pairs(kind, tmp_path):
    """Of NumPy arrays or tensors, weighted, and the same from one table as from a pair."""
    x, y = pairs(400)
    options = {"max_steps": 20, "progress": False, "sample_weight": 1.0 + np.arange(400) % 3}
    flows = [
        kind(2, 3, width=8, depth=2, generator=torch.Generator().manual_seed(0)) for _ in range(3)
    ]
    run = pl.fit(flows[0], (x, y), out=tmp_path / "run", **options)
    pl.fit(flows[1], (torch.from_numpy(x), torch.from_numpy(y)), **options)
    pl.fit(flows[2], np.concatenate([x, y], 1), **options)
    for other in (flows[1], flows[2], pl.load(tmp_path / "run")):
        for name, tensor in flows[0].state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
    held = x[:50], y[:50]
    assert math.isfinite(run.validation)
    assert flows[0].log_prob(*map(torch.from_numpy, held)).isfinite().all()
    no_weights = kind(2, 3, width=8, depth=2, generator=torch.Generator().manual_seed(0))
    pl.fit(no_weights, (x, y), validation=held, max_steps=20, progress=False)
    assert not torch.equal(no_weights.standardize.mean, flows[0].standardize.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes(kind, tmp_path):
    x, y = pairs(20)
    flow = kind(2, 3)
    for data, text in [
        ((x, y[:19]), r"`data` must be a pair \(x, context\) of as many rows, got \(20, 2\)"),
        ((x, y, y), r"`data` must be a pair \(x, context\)"),
        ((x, y[:, :2]), r"must be a pair \(x, context\) with 2 and 3 columns, got 4"),
    ]:
        with pytest.raises(ShapeError, match=text):
            pl.fit(flow, data, out=tmp_path / "run", progress=False)
    with pytest.raises(ShapeError, match="`validation` must have 5 columns"):
        pl.fit(flow, (x, y), validation=(x, x), out=tmp_path / "run", progress=False)
    with pytest.raises(DataError, match=r"`data\[1\]`"):
        pl.fit(flow, (x, np.full_like(y, np.nan)), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    for call in (flow.log_prob, flow.to_reference, flow.from_reference, flow.rank):
        with pytest.raises(ShapeError, match=r"`context` must be \(3,\) or \(4, 3\), got \(4, 2\)"):
            call(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ShapeError, match=r"`context` must be \(..., 3\), got \(2,\)"):
        flow(torch.zeros(2))
    with pytest.raises(ArgumentError, match="`context_dim`"):
        kind(2, -1)
    if kind is ConditionalOTFlow:
        with pytest.raises(ArgumentError, match="`context_dim` must be a positive integer, got 0"):
            kind(2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, tmp_path):
    x, y = pairs(40)
    flow = prepared(kind, x, y, embedding=3, support=[(-1.0, 1.0), (None, None)]).float()
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    pl.save(flow, tmp_path / "model")
    for other in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),
        pl.load(tmp_path / "model"),
    ):
        assert type(other) is kind and other.config() == flow.config()
        assert torch.equal(other.log_prob(x, y), flow.log_prob(x, y))
        assert torch.equal(other.sample(6, y[0], seed=2), flow.sample(6, y[0], seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_module_of_ones_own(kind):
    """It sees standardised contexts, and its parameters are trained."""

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, context):
            return self.gain * context[:, :1]

    x, y = pairs()
    flow = prepared(kind, x, y, embedding=First())
    features = flow.features(torch.from_numpy(y))
    torch.testing.assert_close(features.mean(), torch.zeros(()).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(features.std(correction=0), torch.ones(()).double())
    flow.requires_grad_(True)
    flow.objective()(torch.from_numpy(np.concatenate([x, y], 1))).total.backward()
    assert flow.embedding.gain.grad.abs() > 0


def test_export_with_embedding(tmp_path):
    """The graphs take contexts in the user's units."""
    x, y = pairs()
    flow = prepared(
        ConditionalOTFlow, x, y, width=6, depth=1, embedding=4, support=[(-1.0, 1.0), (None, None)]
    ).float()
    flow.steps = 4
    told = export_flow(flow, tmp_path / "out", to="torch-export")
    assert told == json.loads((tmp_path / "out/export.json").read_text())
    assert told["functions"]["sample"]["inputs"] == {"z": ["batch", 2], "context": ["batch", 3]}
    functions = {
        name: torch.export.load(tmp_path / f"out/{name}.pt2").module()
        for name in ("log_prob", "sample")
    }
    for rows in (1, 60):
        context = torch.from_numpy(y[:rows]).float()
        z = flow.reference_sample(rows, seed=5)
        x = flow.from_reference(z, context)
        got = functions["sample"](z, context)
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
        got, want = functions["log_prob"](x, context), flow.log_prob(x, context)
        assert ((got - want).abs() / want.abs().clamp_min(1)).max() < 1e-5
