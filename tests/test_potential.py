"""The potential and its closed-form derivatives against its definition, differentiated."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from pathline.control import rollout
from pathline.errors import ArgumentError, ShapeError
from pathline.flows import OTFlow, Transport
from pathline.nets import AutodiffPotential, Potential
from pathline.nets.trace import TILE
from plain import PlainPotential, random_potential

NAMES = ("value", "grad", "dt", "laplacian")


def everything(derivatives):
    return tuple(getattr(derivatives, name) for name in NAMES)


def close(got, want, tolerance=1e-10):
    """Relative to the size of the whole array: entries may be near zero."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1.0)


def points(batch, dim, context_dim=0):
    context = torch.randn(batch, context_dim).double() if context_dim else None
    return torch.randn(batch, dim).double(), torch.rand(batch).double(), context


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [1, 2, 7, 43])
def test_derivatives_are_exact(dim, depth, context_dim):
    potential = random_potential(dim, 12, depth, context_dim=context_dim)
    plain = PlainPotential(potential)
    x, times, context = points(5, dim, context_dim)
    for t in (times, torch.tensor(0.3, dtype=torch.float64)):
        got = everything(potential.derivatives(x, t, context))
        for a, b in zip(got, plain.derivatives(x, t, context), strict=True):
            close(a, b)
        close(potential(x, t, context), plain(x, t, context))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_switch_leaves_the_rest_unchanged(depth):
    potential = random_potential(3, 6, depth)
    x, t, _ = points(4, 3)
    full = potential.derivatives(x, t)
    for mask in range(16):
        switches = {name: bool(mask >> i & 1) for i, name in enumerate(NAMES)}
        part = potential.derivatives(x, t, **switches)
        for name, on in switches.items():
            if on:
                torch.testing.assert_close(
                    getattr(part, name), getattr(full, name), rtol=1e-13, atol=1e-13
                )
            else:
                assert getattr(part, name) is None


class Everything(nn.Module):
    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def forward(self, x, t, context):
        return everything(self.potential.derivatives(x, t, context))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scalar_time", [False, True])
def test_gradients(depth, scalar_time):
    module = Everything(random_potential(2, 4, depth, context_dim=1))
    names = [name for name, _ in module.named_parameters()]
    x, t, context = points(3, 2, 1)
    inputs = [x, t[0].clone() if scalar_time else t, context]
    inputs += [p.detach().clone() for p in module.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()

    def function(x, t, context, *params):
        return functional_call(module, dict(zip(names, params, strict=True)), (x, t, context))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("depth", [2, 3])
def test_gradients_of_all_match_the_definition(depth):
    """Every parameter's gradient of one mixed loss, through double backward of the definition."""
    potential = random_potential(3, 8, depth)
    x, t, _ = points(6, 3)
    weights = [torch.randn(6).double(), torch.randn(6, 3).double(), *torch.randn(2, 6).double()]
    loss = [
        sum((w * q).sum() for w, q in zip(weights, parts, strict=True))
        for parts in (
            everything(potential.derivatives(x, t)),
            PlainPotential(potential).derivatives(x, t),
        )
    ]
    parameters = list(potential.parameters())
    got, want = (torch.autograd.grad(one, parameters) for one in loss)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_one_row_tiles_give_the_same(monkeypatch):
    potential = random_potential(5, 8)
    x, t, _ = points(7, 5)
    weight = torch.randn(7).double()

    def trace_and_gradients():
        trace = potential.derivatives(x, t).laplacian
        return trace, *torch.autograd.grad(
            (weight * trace).sum(), list(potential.layers.parameters())
        )

    whole = trace_and_gradients()
    monkeypatch.setattr("pathline.nets.trace.TILE_ROWS", 1)
    for a, b in zip(trace_and_gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("pathline.nets.trace.TILE_ROWS", 3)
    for a, b in zip(trace_and_gradients(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# The Laplacian's gradient, known before


def losses_of(potential, context_dim=0, batch=6, evaluations=3, seed=3):
    """Points, and the sum over evaluations of weight_e known . laplacian_e + other terms."""
    torch.manual_seed(seed)
    inputs = [points(batch, potential.dim, context_dim) for _ in range(evaluations)]
    known, weights = torch.rand(batch).double() + 0.1, (0.7, -1.3, 0.2)

    def loss(adjoint, factor=1.0):
        bound, total = potential.bind(), 0.0
        for weight, (x, t, context) in zip(weights, inputs, strict=True):
            given = weight * known if adjoint else None
            phi = bound(x, t, context, laplacian_adjoint=given)
            total = total + factor * weight * (known * phi.laplacian).sum()
            total = total + phi.grad.square().sum() + phi.dt.sum() * phi.value.mean()
        return total

    return loss, inputs


@pytest.mark.parametrize("dim, width", [(3, 8), (1, 5), (9, 4)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_known_adjoint_gives_the_gradients_of_autograd(depth, context_dim, dim, width):
    potential = random_potential(dim, width, depth, context_dim=context_dim)
    loss, inputs = losses_of(potential, context_dim)
    wanted = [*potential.parameters()]
    for x, t, context in inputs:
        wanted += [x.requires_grad_(), t.requires_grad_()]
        wanted += [] if context is None else [context.requires_grad_()]
    for factor in (1.0, -3.0):
        got, want = (loss(adjoint, factor) for adjoint in (True, False))
        assert torch.equal(got, want)
        got, want = (torch.autograd.grad(one, wanted) for one in (got, want))
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-12)


@pytest.mark.parametrize("dim, width", [(2, 3), (4, 3)])
def test_laplacian_can_be_differentiated_twice(dim, width):
    potential = random_potential(dim, width)
    x, t, _ = points(2, dim)

    def laplacian(x, t):
        return potential.derivatives(x, t).laplacian

    assert torch.autograd.gradgradcheck(laplacian, (x.requires_grad_(), t.requires_grad_()))


def test_known_adjoint_over_tiles(monkeypatch):
    potential = random_potential(5, 8)
    loss, _ = losses_of(potential, batch=7)
    want = torch.autograd.grad(loss(True), list(potential.parameters()))
    for rows, entries in ((1, 1), (3, 1), (3, 48), (1024, 200)):  # 2 and 3 columns at once
        monkeypatch.setattr("pathline.nets.trace.TILE_ROWS", rows)
        monkeypatch.setitem(TILE, "cpu", entries)
        for a, b in zip(
            torch.autograd.grad(loss(True), list(potential.parameters())), want, strict=True
        ):
            close(a, b, 1e-13)


def test_known_adjoint_twice_backward():
    potential = random_potential(3, 8)
    total = losses_of(potential)[0](True)
    parameters = list(potential.parameters())
    first = torch.autograd.grad(total, parameters, retain_graph=True)
    for a, b in zip(torch.autograd.grad(total, parameters), first, strict=True):
        assert torch.equal(a, b)


def known_laplacians(potential, evaluations=3):
    x, t, _ = points(5, potential.dim)
    known, bound = torch.rand(5).double() + 0.1, potential.bind()
    return known, [bound(x, t, laplacian_adjoint=known).laplacian for _ in range(evaluations)]


WRONG = r"`laplacian_adjoint` \(`adjoint` of a rollout\) must be the gradient of the loss"


@pytest.mark.parametrize(
    "loss",
    [
        lambda known, parts: sum(part.sum() for part in parts),  # another direction
        lambda known, parts: sum((known * part).sum() for part in parts[:2]),  # one is left out
        lambda known, parts: sum((i * known * part).sum() for i, part in enumerate(parts)),
        lambda known, parts: sum((1 + 1e-5 * i) * (known @ part) for i, part in enumerate(parts)),
        lambda known, parts: sum((known * part)[:4].sum() for part in parts),
        lambda known, parts: sum((known * part.square()).sum() for part in parts),
    ],
    ids=["direction", "left out", "factors", "nearly", "rows", "nonlinear"],
)
def test_wrong_adjoint_raises(loss):
    potential = random_potential(3, 8)
    known, parts = known_laplacians(potential)
    with pytest.raises(ArgumentError, match=WRONG):
        loss(known, parts).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_adjoint_that_is_not_needed(dtype):
    """Laplacians that are left out altogether, with the factor zero, or not a number."""
    potential = random_potential(3, 8).to(dtype)
    x, t, known = torch.randn(5, 3, dtype=dtype), torch.tensor(0.5, dtype=dtype), torch.ones(5)
    K = potential.layers[1].weight
    for factor in (0.0, math.nan):
        parts = [potential.derivatives(x, t, laplacian_adjoint=known.to(dtype)) for _ in range(2)]
        total = sum(factor * part.laplacian.sum() for part in parts)
        (got,) = torch.autograd.grad(total, K)
        assert torch.equal(got, torch.full_like(K, factor)) or got.isnan().all()
    phi = potential.derivatives(x, t, laplacian_adjoint=known.to(dtype))
    (got,) = torch.autograd.grad(phi.grad.sum(), K)
    (want,) = torch.autograd.grad(potential.derivatives(x, t, laplacian=False).grad.sum(), K)
    torch.testing.assert_close(got, want)
    nothing = potential.derivatives(x, t, laplacian_adjoint=0 * known.to(dtype)).laplacian
    (got,) = torch.autograd.grad((0 * nothing).sum(), K)
    assert not got.any()
    with torch.no_grad():
        quiet = potential.derivatives(x, t, laplacian_adjoint=known.to(dtype)).laplacian
    assert torch.equal(quiet, nothing) and not quiet.requires_grad


def test_known_adjoint_can_not_be_differentiated_twice():
    potential = random_potential(3, 8)
    known, parts = known_laplacians(potential)
    total = sum((known * part).sum() for part in parts)
    with pytest.raises(ArgumentError, match="can't be differentiated again, so `create_graph`"):
        torch.autograd.grad(total, list(potential.layers.parameters()), create_graph=True)


def test_known_adjoint_keeps_little():
    """What a backward pass needs grows with batch x width, and not with the columns."""
    kept = {}
    for dim in (8, 32):
        potential = random_potential(dim, 16)
        own = {p.data_ptr() for p in potential.parameters()}
        sizes = []

        def pack(tensor, own=own, sizes=sizes):
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        x = torch.randn(200, dim).double()
        t, known = torch.tensor(0.1).double(), torch.ones(200).double()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            potential.bind()(x, t, laplacian_adjoint=known)
        kept[dim] = sum(sizes) - 2 * 200 * dim  # but for x and As, which belong to the gradient
        assert max(sizes) <= 200 * 33
    assert kept[32] < 1.2 * kept[8]


# Fewer columns: the Gram form and probes


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("dim", [9, 40])
def test_more_columns_than_neurons(dim, depth):
    """Value and every gradient of the trace, from a basis with as many columns as neurons."""
    potential = random_potential(dim, 6, depth)
    x, t, _ = points(4, dim)
    parameters = list(potential.parameters())
    weight = torch.randn(4).double()
    got = potential.derivatives(x, t).laplacian
    want = PlainPotential(potential).derivatives(x, t)[3]
    close(got, want)
    losses = [(weight * q).sum() for q in (got, want)]
    gradients = (torch.autograd.grad(one, parameters, allow_unused=True) for one in losses)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


def all_signs(dim):
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * dim).reshape(-1, dim)


@pytest.mark.parametrize(
    "make", [lambda p: p, lambda p: AutodiffPotential(PlainPotential(p), p.dim)]
)
@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_probes_are_unbiased(depth, dim, make):
    """The mean over all sign vectors is the Laplacian, and so are the gradients."""
    potential = random_potential(dim, 6, depth)
    x, t, _ = points(3, dim)
    parameters = list(potential.layers.parameters())
    model = make(potential)
    estimates = torch.stack(
        [model.derivatives(x, t, probe=e.expand(3, dim)).laplacian for e in all_signs(dim)]
    )
    exact = potential.derivatives(x, t).laplacian
    close(estimates.mean(0), exact)
    if dim > 1 and (depth > 1 or model is not potential):
        assert (estimates - exact).abs().max() > 1e-3
    else:
        close(estimates[0], exact)
    grads = (torch.autograd.grad(q.sum(), parameters) for q in (estimates.mean(0), exact))
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("depth", [2, 3])
def test_each_row_has_its_own_probe(depth):
    potential = random_potential(4, 6, depth)
    x, t, _ = points(16, 4)
    whole = potential.derivatives(x, t, probe=all_signs(4)).laplacian
    for i, e in enumerate(all_signs(4)):
        row = slice(i, i + 1)
        close(potential.derivatives(x[row], t[row], probe=e[None]).laplacian, whole[row], 1e-13)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("probe", [False, True])
def test_low_precision_products(depth, probe):
    """Products in bfloat16 change the Laplacian and its gradients by no more than its rounding;
    value, gradient and dt are left as they are."""
    potential = random_potential(12, 32, depth).float()
    torch.manual_seed(1)
    x, t = torch.randn(200, 12), torch.tensor(0.4)
    signs = 2.0 * torch.randint(0, 2, (200, 12)) - 1 if probe else None
    results = []
    for dtype in (None, torch.bfloat16):
        phi = potential.bind(signs, dtype)(x, t)
        grads = torch.autograd.grad(phi.laplacian.mean(), list(potential.layers.parameters()))
        results.append((phi, torch.cat([g.flatten() for g in grads])))
    (exact, want), (low, got) = results
    assert torch.equal(low.grad, exact.grad) and torch.equal(low.value, exact.value)
    assert low.laplacian.dtype == torch.float32
    assert not torch.equal(low.laplacian, exact.laplacian)
    assert (low.laplacian - exact.laplacian).norm() < 1e-3 * exact.laplacian.norm()
    assert (got - want).norm() < 3e-3 * want.norm()


def test_quadratic_potential():
    """w = 0: Phi = 1/2 s.Q s + b.s + c with Q = A^T A, Laplacian the trace of its x block."""
    potential = random_potential(4, 6, context_dim=2)
    with torch.no_grad():
        potential.w.zero_()
    x, t, context = points(5, 4, 2)
    s = torch.cat([x, t[:, None], context], 1)
    Q, b = potential.A.T @ potential.A, potential.b
    got = potential.derivatives(x, t, context)
    close(got.value, 0.5 * torch.einsum("ni,ij,nj->n", s, Q, s) + s @ b + potential.c)
    close(got.grad, (s @ Q + b)[:, :4])
    close(got.dt, (s @ Q + b)[:, 4])
    close(got.laplacian, Q[:4, :4].trace().expand(5))


@pytest.mark.parametrize(
    "dim, width, count",
    [
        (2, 32, 1229),
        (6, 128, 17721),
        (8, 350, 126791),
        (21, 256, 72179),
        (43, 256, 78053),
        (63, 512, 297153),
    ],
)
def test_published_parameter_counts(dim, width, count):
    potential = Potential(dim, width)
    assert sum(p.numel() for p in potential.parameters()) == count
    flow = OTFlow(dim, width, 2)
    assert sum(p.numel() for p in flow.parameters()) == count - 1  # c is a buffer there
    assert flow.potential.c.shape == ()


def test_published_start():
    potential = Potential(3, 8, depth=4)
    assert (potential.w == 1).all() and (potential.b == 0).all() and potential.c == 0
    assert torch.equal(potential.layers[1].weight, potential.layers[3].weight)
    assert torch.equal(potential.layers[1].bias, potential.layers[2].bias)
    assert potential.layers[1].weight.data_ptr() != potential.layers[2].weight.data_ptr()
    other = Potential(3, 8, depth=4)
    assert not torch.equal(potential.A, other.A)
    seeded = [Potential(3, 8, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    for a, b in zip(*(p.parameters() for p in seeded), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "x, t, context, text",
    [
        ((3,), (), (4, 2), r"`x` must be \(batch, 3\), got \(3,\)"),
        ((4, 2), (), (4, 2), r"`x` must be \(batch, 3\), got \(4, 2\)"),
        ((4, 3), (5,), (4, 2), r"`t` must be \(\) or \(4,\), got \(5,\)"),
        ((4, 3), (4, 1), (4, 2), r"`t` must be \(\) or \(4,\), got \(4, 1\)"),
        ((4, 3), (4,), (4, 3), r"`context` must be \(4, 2\), got \(4, 3\)"),
        ((4, 3), (4,), (1, 2), r"`context` must be \(4, 2\), got \(1, 2\)"),
        ((4, 3), (4,), None, r"`context` must be \(4, 2\), got None"),
    ],
)
def test_shape_errors(x, t, context, text):
    potential = Potential(3, 4, context_dim=2)
    context = None if context is None else torch.zeros(context)
    with pytest.raises(ShapeError, match=text):
        potential(torch.zeros(x), torch.zeros(t), context)
    with pytest.raises(ShapeError, match=text):
        potential.derivatives(torch.zeros(x), torch.zeros(t), context)


def test_unwanted_context():
    with pytest.raises(ShapeError, match=r"`context` must be None, got \(4, 1\)"):
        Potential(3, 4)(torch.zeros(4, 3), torch.zeros(()), torch.zeros(4, 1))


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"dim": 0}, "`dim` must be a positive integer, got 0"),
        ({"width": 2.0}, "`width` must be a positive integer, got 2.0"),
        ({"depth": 0}, "`depth` must be a positive integer, got 0"),
        ({"rank": -1}, "`rank` must be a positive integer, got -1"),
        ({"context_dim": -1}, "`context_dim` must be an integer >= 0, got -1"),
    ],
)
def test_argument_errors(arguments, text):
    with pytest.raises(ArgumentError, match=text):
        Potential(**{"dim": 2, "width": 4} | arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_overflow_and_dtype_kept(dtype, depth):
    potential = random_potential(3, 6, depth).to(dtype)
    x = torch.tensor([[1e4, -1e4, 1e4], [0, 0, 0], [1e-4, 1, -20]], dtype=dtype).requires_grad_()
    got = everything(potential.derivatives(x, torch.tensor(0.5, dtype=dtype)))
    for tensor in got:
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()
    sum(tensor.sum() for tensor in got).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in potential.parameters())


def test_value_at_large_inputs():
    """sig(a) = |a| beyond round-off: the network becomes piecewise linear."""
    potential = random_potential(2, 5, depth=1)
    x = 1e4 * torch.randn(6, 2).double()
    t = torch.tensor(0.0).double()
    s = torch.cat([x, torch.zeros(6, 1).double()], 1)
    layer = potential.layers[0]
    want = (s @ layer.weight.T + layer.bias).abs() @ potential.w
    want = want + 0.5 * (s @ potential.A.T).square().sum(1) + s @ potential.b + potential.c
    torch.testing.assert_close(potential(x, t), want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    potential = random_potential(3, 4)
    got = potential.derivatives(torch.zeros(batch, 3).double(), torch.zeros(()).double())
    shapes = [tuple(tensor.shape) for tensor in everything(got)]
    assert shapes == [(batch,), (batch, 3), (batch,), (batch,)]


@pytest.mark.parametrize("scalar_time", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_autodiff_potential_agrees(depth, scalar_time):
    potential = random_potential(3, 6, depth, context_dim=2)
    wrapped = AutodiffPotential(PlainPotential(potential), 3)
    x, t, context = points(5, 3, 2)
    t = t[0] if scalar_time else t
    got, want = wrapped.derivatives(x, t, context), potential.derivatives(x, t, context)
    for a, b in zip(everything(got), everything(want), strict=True):
        close(a, b, 1e-12)
    parameters = list(potential.parameters())
    losses = [sum(q.square().sum() for q in everything(each)) for each in (got, want)]
    for a, b in zip(*(torch.autograd.grad(one, parameters) for one in losses), strict=True):
        close(a, b)


def test_autodiff_potential_without_gradients():
    wrapped = AutodiffPotential(PlainPotential(random_potential(3, 6)), 3)
    x, t, _ = points(5, 3)
    with torch.no_grad():
        quiet = wrapped.derivatives(x, t)
    assert not x.requires_grad and not t.requires_grad
    for tensor, want in zip(everything(quiet), everything(wrapped.derivatives(x, t)), strict=True):
        assert tensor.grad_fn is None and not tensor.requires_grad
        assert torch.equal(tensor, want)
        assert want.requires_grad
    part = wrapped.derivatives(x, t, value=False, laplacian=False)
    assert part.value is None and part.laplacian is None and part.grad is not None


def test_autodiff_potential_checks_the_network():
    wrapped = AutodiffPotential(lambda_module(lambda x, t, context: x), 3)
    with pytest.raises(ShapeError, match=r"must return \(5,\), got \(5, 3\)"):
        wrapped(torch.zeros(5, 3), torch.zeros(()))


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_random_features():
    """Hyperplanes pass through a row at a time in [0, 1], and a generator decides everything."""
    rows = torch.randn(50, 2).double() + 5
    potentials = [Potential(2, 16).double() for _ in range(2)]
    for potential in potentials:
        potential.random_features(rows, 1.0, torch.Generator().manual_seed(3))
    for a, b in zip(*(p.parameters() for p in potentials), strict=True):
        assert torch.equal(a, b)
    weight, bias = potentials[0].layers[0].weight, potentials[0].layers[0].bias
    times = -(rows @ weight[:, :2].T + bias) / weight[:, 2]  # of each row on each hyperplane
    assert ((times > -1e-9) & (times < 1 + 1e-9)).any(0).all()


DATA = Path(os.environ.get("PATHLINE_DATA", "/nowhere")) / "ckpt_otflow"


@pytest.mark.skipif(not DATA.is_dir(), reason="set PATHLINE_DATA to a folder with ckpt_otflow")
@pytest.mark.parametrize(
    "name, width", [("swissroll", 32), ("miniboone", 256), ("interp_mnist", 128)]
)
def test_authors_checkpoint(name, width):
    """The published potentials give the values that the authors' own code gave."""
    weights, oracle = np.load(DATA / name / "weights.npz"), np.load(DATA / name / "oracle.npz")
    stored = {key: torch.from_numpy(value).double() for key, value in oracle.items()}
    dim = stored["x"].shape[1]
    potential = Potential(dim, width).double()
    state = {"A": weights["A"], "b": weights["c.weight"][0], "c": weights["c.bias"][0]}
    state["w"] = weights["w.weight"][0]
    for i in (0, 1):
        for part in ("weight", "bias"):
            state[f"layers.{i}.{part}"] = weights[f"N.layers.{i}.{part}"]
    potential.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    with torch.no_grad():
        got = potential.derivatives(stored["s"][:, :dim], stored["s"][:, dim])
        close(got.value, stored["phi"][:, 0], 1e-9)
        close(got.grad, stored["grad"][:, :dim], 1e-9)
        close(got.dt, stored["grad"][:, dim], 1e-9)
        close(got.laplacian, stored["trHess"], 1e-9)
        at = potential.derivatives(stored["x"], torch.tensor(0.3, dtype=torch.float64))
        L = 0.5 * at.grad.square().sum(1)
        rates = [-at.grad, -at.laplacian[:, None], L[:, None], (at.dt - L).abs()[:, None]]
        close(torch.cat(rates, 1), stored["odefun_t0.3"], 1e-9)
        steps = int(stored["nt/steps"])
        close(rollout(Transport(dim), potential, stored["x"], steps=steps).z, stored["nt/z"], 1e-9)
