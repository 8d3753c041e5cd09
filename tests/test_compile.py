"""A whole solve as one graph: torch.compile, and CUDA graphs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pathline.integrate import odeint


@pytest.fixture(autouse=True)
def same_distributions(same_torch):
    """Tracing switches the checks of torch.distributions off, for good."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


NAMES = ["rk4", "euler", "midpoint", "asynchronous_leapfrog"]
TIMES = [0.0, 0.3, 0.5, 1.0]


def build(times, name):
    """A solve as a function of the state, and the velocity's module."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def v(t, y):
        return net(y) * torch.cos(t)

    if times == "tensor":
        return lambda y, t: odeint(v, y, t, method=name), net
    return lambda y, t: odeint(v, y, tuple(TIMES), method=name), net


def compare(name, times, backend):
    """One graph, with the values and gradients of the solve that is not compiled."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    solve, net = build(times, name)
    compiled = torch.compile(solve, fullgraph=True, backend=counting)
    t = torch.tensor(TIMES)
    results = []
    for run in (solve, compiled):
        y0 = torch.tensor([[1.0, -0.5], [0.2, 0.7]], requires_grad=True)
        y = run(y0, t)
        grads = torch.autograd.grad(y.square().sum(), (y0, *net.parameters()))
        results.append([y.detach(), *grads])
    assert len(graphs) == 1
    for eager, fast in zip(*results, strict=True):
        assert_close(fast, eager, rtol=1e-5, atol=1e-6)  # fused operations round otherwise
    with torch.no_grad():
        again = compiled(torch.ones(2, 2), t)
        assert_close(again, solve(torch.ones(2, 2), t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("times", ["tensor", "floats"])
@pytest.mark.parametrize("name", NAMES)
def test_one_graph(name, times):
    """As traced, without a compiler behind it."""
    compare(name, times, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name, times", [("rk4", "tensor"), ("asynchronous_leapfrog", "floats")])
def test_compiled(name, times):
    compare(name, times, "inductor")


def test_what_can_not_be_compiled_says_so():
    """A step size would ask for the values of the times."""
    torch._dynamo.reset()

    def solve(y, t):
        return odeint(lambda t, y: -y, y, t, method="rk4", options={"step_size": 0.1})

    with pytest.raises(Exception, match="list all times in"):
        torch.compile(solve, fullgraph=True, backend="eager")(torch.ones(2), torch.tensor(TIMES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(name):
    """A captured forward solve, replayed on new data."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)
    t = torch.tensor(TIMES, device=device, dtype=torch.float64)
    y0 = torch.ones(8, 2, device=device)

    def solve():
        return odeint(lambda t, y: net(y) * torch.cos(t), y0, t, method=name)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                solve()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = solve()
        for _ in range(2):
            y0.copy_(torch.randn_like(y0))
            graph.replay()
            assert_close(captured, solve(), rtol=1e-5, atol=1e-6)
