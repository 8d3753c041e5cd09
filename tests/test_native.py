"""The compiled kernel against the PyTorch path, whose oracles are in test_rollout.py."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from pathline import native
from pathline.control import Adjoint, rollout
from pathline.control.rollout import kernel_serves
from pathline.errors import ArgumentError, ShapeError
from pathline.flows import OTFlow, Transport
from pathline.native import rollouts
from plain import random_potential

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="the kernel was not compiled: no C++ compiler"
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
# dim, width, depth, context_dim: odd sizes leave remainders in every loop of the kernel
SHAPES = [(1, 5, 1, 0), (2, 32, 2, 0), (3, 17, 2, 2), (6, 24, 3, 1), (9, 5, 2, 0), (13, 9, 4, 3)]


def case(shape, dtype, rows=37, scale=1.0):
    dim, width, depth, context_dim = shape
    potential = random_potential(dim, width, depth, context_dim=context_dim, scale=scale)
    potential = potential.to(dtype)
    x = torch.randn(rows, dim, dtype=torch.float64).to(dtype).requires_grad_()
    context = None
    if context_dim:
        context = torch.randn(rows, context_dim, dtype=torch.float64).to(dtype).requires_grad_()
    return potential, x, context


def results(potential, x, context, **options):
    """Everything that a rollout gives, and its gradient in everything for a random loss."""
    path = rollout(Transport(potential.dim), potential, x, context=context, **options)
    names = ("z", "running_cost", "log_det", "hjb")
    found = {name: getattr(path, name) for name in names if getattr(path, name) is not None}
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)).sum()
        for value in found.values()
    )
    inputs = {"x": x, "context": context, **dict(potential.named_parameters())}
    wanted = {k: v for k, v in inputs.items() if v is not None and k != "c"}
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    assert any(g.abs().max() > 0 for g in gradients)
    return {k: v.detach() for k, v in found.items()} | dict(zip(wanted, gradients, strict=True))


def assert_same(mine, theirs, dtype):
    assert mine.keys() == theirs.keys()
    size = max(v.abs().max().item() for k, v in theirs.items() if k not in ("z", "log_det"))
    for name, value in theirs.items():
        error = (mine[name] - value).abs().max().item()
        assert error < TOLERANCE[dtype] * max(size, value.abs().max().item()), name


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch(shape, dtype, instruction_set):
    arguments = case(shape, dtype)
    for options in (
        {"steps": 3},
        {"steps": 2, "start": 1.0, "stop": 0.0},
        {"steps": 2, "integrals": False},
    ):
        with native.using(None):
            theirs = results(*arguments, **options)
        with native.using(instruction_set):
            assert_same(results(*arguments, **options), theirs, dtype)


def test_many_steps_and_large_networks_leave_the_cache():
    # More evaluations than the kernel keeps: it computes the first ones again.
    for shape, steps in (((2, 32, 2, 0), 60), ((5, 64, 3, 0), 20)):
        arguments = case(shape, torch.float64)
        with native.using(None):
            theirs = results(*arguments, steps=steps)
        assert_same(results(*arguments, steps=steps), theirs, torch.float64)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 200])
def test_every_number_of_rows(rows):
    potential, x, context = case((3, 8, 2, 2), torch.float64, rows=rows)
    options = {"steps": 2, "context": context}
    with native.using(None):
        theirs = rollout(Transport(3), potential, x, **options)
    mine = rollout(Transport(3), potential, x, **options)
    torch.testing.assert_close(mine.z, theirs.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.log_det, theirs.log_det, rtol=1e-12, atol=1e-12)
    mine.log_det.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("depth", [2, 3])
def test_probes_equal_pytorch_and_average_to_the_exact_gradient(depth):
    potential, x, context = case((3, 7, depth, 1), torch.float64)
    exact = results(potential, x, context, steps=2)
    sums = {name: torch.zeros_like(value) for name, value in exact.items()}
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        probe = torch.tensor(signs, dtype=torch.float64).expand(len(x), 3)
        mine = results(potential, x, context, steps=2, probe=probe)
        for name, value in mine.items():
            sums[name] += value / 8
    assert (mine["log_det"] - exact["log_det"]).abs().max() > 1e-3
    assert_same(sums, exact, torch.float64)
    with native.using(None):
        theirs = results(potential, x, context, steps=2, probe=probe)
    assert_same(mine, theirs, torch.float64)


def weights(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    w = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype) / rows
    return Adjoint(terminal_cost=w, running_cost=0.3 * w, log_det=-w, hjb=0.7 * w)


def weighted_loss(problem, path, a):
    return (
        a.terminal_cost * problem.terminal_cost(path.z)
        + a.running_cost * path.running_cost
        + a.log_det * path.log_det
        + a.hjb * path.hjb
    ).sum()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_known_adjoint_changes_nothing(shape, dtype):
    potential, x, context = case(shape, dtype)
    problem, a = Transport(potential.dim), weights(len(x), dtype)
    inputs = [x, *(p for n, p in potential.named_parameters() if n != "c")]

    def gradient(adjoint, factor):
        path = rollout(problem, potential, x, context=context, steps=3, adjoint=adjoint)
        loss = factor * weighted_loss(problem, path, a)
        return dict(enumerate(torch.autograd.grad(loss, inputs, materialize_grads=True)))

    with native.using(None):
        theirs = gradient(None, 3.0)
    assert_same(gradient(a, 3.0), theirs, dtype)  # known up to a factor
    with native.using(None):
        assert_same(gradient(a, 3.0), theirs, dtype)


def test_a_wrong_adjoint_raises():
    potential, x, _ = case((3, 8, 2, 0), torch.float64)
    problem, a = Transport(3), weights(len(x))
    wrong = [
        lambda path: path.log_det.square().sum(),
        lambda path: weighted_loss(problem, path, a) + path.hjb.sum(),
        lambda path: weighted_loss(problem, path, a) + path.z.sum(),
        lambda path: -(a.log_det * path.log_det).sum(),
    ]
    for loss in wrong:
        path = rollout(problem, potential, x, steps=2, adjoint=a)
        with pytest.raises(ArgumentError, match="`adjoint` must be proportional"):
            loss(path).backward()


def test_gradients_can_be_differentiated_again():
    potential, x, context = case((2, 5, 2, 1), torch.float64, rows=3)

    def log_det(x, context, *parameters):
        return rollout(Transport(2), potential, x, context=context, steps=2).log_det

    inputs = (x, context, *(p for n, p in potential.named_parameters() if n != "c"))
    assert torch.autograd.gradcheck(log_det, inputs)
    score = torch.autograd.grad(log_det(*inputs).sum(), x, create_graph=True)[0]
    mine = torch.autograd.grad(score.square().sum(), inputs, materialize_grads=True)
    with native.using(None):
        score = torch.autograd.grad(log_det(*inputs).sum(), x, create_graph=True)[0]
        theirs = torch.autograd.grad(score.square().sum(), inputs, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_equal_runs_give_equal_bits_with_any_number_of_threads():
    potential, x, _ = case((3, 16, 2, 0), torch.float32, rows=700)
    runs = []
    for threads in (1, 1, 2, 3):
        with native.threads(threads):
            runs.append(results(potential, x, None, steps=2))
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    potential, x, _ = case((3, 8, 2, 0), torch.float64)
    x = x.detach().clone()
    good = rollout(Transport(3), potential, x, steps=2)
    x[5, 1] = bad
    path = rollout(Transport(3), potential, x, steps=2)
    assert not path.log_det[5].isfinite()
    others = torch.arange(len(x)) != 5
    torch.testing.assert_close(path.log_det[others], good.log_det[others], rtol=0, atol=0)


def test_large_arguments_do_not_overflow():
    for dtype in TOLERANCE:
        potential, x, _ = case((2, 6, 2, 0), dtype, scale=3.0)
        with torch.no_grad():
            potential.layers[0].bias.copy_(torch.linspace(-1e4, 1e4, 6))
            with native.using(None):
                theirs = rollout(Transport(2), potential, x, steps=1)
            mine = rollout(Transport(2), potential, x, steps=1)
        torch.testing.assert_close(mine.z, theirs.z, rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(mine.log_det, theirs.log_det, rtol=3e-6, atol=1e-5)


def test_serves_only_what_it_knows():
    potential, x, _ = case((2, 5, 2, 0), torch.float32)
    assert rollouts.can_serve(potential, x, None)
    assert not rollouts.can_serve(potential, x.double(), None)
    assert not rollouts.can_serve(nn.Linear(2, 1), x, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not rollouts.can_serve(potential, x, None)
    with native.using(None):
        assert not rollouts.can_serve(potential, x, None)
    assert rollouts.can_serve(potential, x, None)


def test_what_others_measure_is_not_the_kernel():
    """`using(None)` must not compare PyTorch with itself: the kernel is called, and it is not."""
    flow, calls = OTFlow(2), []
    real = native._kernel.rollout
    native._kernel.rollout = lambda **arguments: calls.append(1) or real(**arguments)
    try:
        flow.log_prob(torch.zeros(3, 2))
        with native.using(None):
            flow.log_prob(torch.zeros(3, 2))
    finally:
        native._kernel.rollout = real
    assert calls == [1]


def test_without_the_kernel_pytorch_serves_and_says_so_once():
    code = """
import sys, warnings
sys.modules["pathline.native._kernel"] = None  # as where it was not compiled
import torch, pathline as pl
flow = pl.flows.OTFlow(2, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(flow.log_prob(torch.ones(1, 2)).item())
    flow.log_prob(torch.ones(1, 2))
print([str(w.message)[:28] for w in caught])
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    value, messages = got.stdout.strip().splitlines()
    flow = OTFlow(2, generator=torch.Generator().manual_seed(0))
    assert float(value) == pytest.approx(flow.log_prob(torch.ones(1, 2)).item(), abs=1e-5)
    assert messages == "['the compiled kernel of Pathl']"


def test_bad_shapes_are_named():
    potential, x, context = case((3, 8, 2, 2), torch.float64)
    a = weights(len(x))
    wrong = {
        "`x`": {"x": x[:, :2]},
        "`context`": {"context": context[:5]},
        "`probe`": {"probe": torch.ones(3, len(x))},
        "`adjoint.hjb`": {"adjoint": Adjoint(a.terminal_cost, a.running_cost, a.log_det, x)},
    }
    for name, changed in wrong.items():
        arguments = {"x": x, "context": context, "steps": 2} | changed
        with pytest.raises(ShapeError, match=f"{name} must be"):
            rollout(Transport(3), potential, **arguments)
    with pytest.raises(ArgumentError, match="`steps` must be at least 1, got 0"):
        rollout(Transport(3), potential, x, context=context, steps=0)


def test_serves_no_other_problem_and_no_reparametrised_network():
    class Slow(Transport):
        def running_cost(self, t, z, u):
            return 2 * super().running_cost(t, z, u)

    potential, x, _ = case((2, 5, 2, 0), torch.float64)
    assert kernel_serves(potential, Transport(2), x)
    assert not kernel_serves(potential, Slow(2), x)
    plain = rollout(Transport(2), potential, x, steps=2).running_cost
    slow = rollout(Slow(2), potential, x, steps=2).running_cost
    torch.testing.assert_close(slow, 2 * plain)
    nn.utils.parametrizations.weight_norm(potential.layers[1])
    assert not kernel_serves(potential, Transport(2), x)
    same = rollout(Transport(2), potential, x, steps=2).running_cost
    torch.testing.assert_close(same, plain)


def test_a_known_adjoint_refuses_a_second_derivative():
    potential, x, _ = case((2, 5, 2, 0), torch.float64)
    a = weights(len(x))
    path = rollout(Transport(2), potential, x, steps=2, adjoint=a)
    with pytest.raises(ArgumentError, match="can't be differentiated again"):
        torch.autograd.grad(weighted_loss(Transport(2), path, a), x, create_graph=True)
