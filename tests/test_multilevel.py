"""Training on levels: kernels against dense operators, networks before and after, work units."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pathline as pl
from pathline.errors import ArgumentError, ShapeError
from pathline.nets import Conv, LeanConv, TimeBasis, prolong_kernels, restrict_kernels
from pathline.networks import (
    Classification,
    ContinuousNet,
    Parabolic,
    deepened,
    dense_net,
    imexnet,
    pde_cnn,
    prolonged,
    restricted,
)
from pathline.train import Level, multilevel

HOW = pytest.mark.parametrize("how", ["galerkin", "rediscretise"])


@HOW
def test_restriction_undoes_prolongation(how):
    kernels = torch.randn(2, 3, 4, 3, 3).double()
    assert_close(restrict_kernels(prolong_kernels(kernels, how), how), kernels)


def test_galerkin_is_the_product_of_operators():
    """R K P as a dense matrix on 8 x 8 pixels, which wrap around."""
    kernel = torch.randn(1, 1, 3, 3).double()
    eye = torch.eye(16).double().view(16, 1, 4, 4)
    fine = eye.repeat_interleave(2, 2).repeat_interleave(2, 3)
    moved = nn.functional.conv2d(nn.functional.pad(fine, (1, 1, 1, 1), mode="circular"), kernel)
    coarse = nn.functional.avg_pool2d(moved, 2)
    padded = nn.functional.pad(eye, (1, 1, 1, 1), mode="circular")
    expected = nn.functional.conv2d(padded, restrict_kernels(kernel, "galerkin"))
    assert_close(coarse, expected, atol=1e-14, rtol=0)


def test_galerkin_of_known_kernels():
    """The figures of the literature; second derivatives only halve, a known inconsistency."""
    laplacian = torch.tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]]).double()
    assert_close(restrict_kernels(laplacian), laplacian / 2)
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]).double()
    expected = torch.tensor([[-0.25, 0, 0.25], [-1.5, 0, 1.5], [-0.25, 0, 0.25]]).double()
    assert_close(restrict_kernels(sobel), expected)


def test_rediscretised_derivatives():
    smooth = torch.tensor([1.0, 2, 1]).double() / 4
    slope, bend = torch.tensor([-1.0, 0, 1]).double() / 2, torch.tensor([-1.0, 2, -1]).double()
    for row, column, factor in ((slope, smooth, 2), (bend, smooth, 4), (bend, slope, 8)):
        kernel = torch.outer(row, column)
        assert_close(restrict_kernels(kernel, "rediscretise"), kernel / factor)
    assert_close(
        prolong_kernels(torch.outer(smooth, smooth), "rediscretise"), torch.outer(smooth, smooth)
    )


def test_errors_of_kernels():
    with pytest.raises(ArgumentError, match="galerkin"):
        restrict_kernels(torch.zeros(3, 3), "galerkn")
    with pytest.raises(ShapeError, match=r"must be \(..., 3, 3\), got \(1, 5, 5\)"):
        prolong_kernels(torch.zeros(1, 5, 5))


def moved(net, scale=0.3):
    """With weights that change in time."""
    for p in net.parameters():
        p.data += scale * torch.randn_like(p)
    return net


@pytest.mark.parametrize("kind, order", [("residual", 1), ("antisymmetric", 4), ("hamiltonian", 1)])
def test_more_layers_change_outputs_by_the_error_of_steps(kind, order):
    """Smooth weights: each doubling changes outputs 2^order times less."""
    time = TimeBasis("legendre", 2, 1.0)
    net = moved(dense_net(kind, 2, 3, width=4, steps=16, time=time)).double()
    x, outputs = torch.randn(6, 2).double(), []
    for _ in range(4):
        outputs.append(net(x).detach())
        net = deepened(net)
    changes = [(b - a).norm().item() for a, b in pairwise(outputs)]
    slopes = -np.diff(np.log2(changes))
    assert slopes[-1] == pytest.approx(order, abs=0.15)


def test_a_deeper_linear_network():
    """(1 + h k)^N becomes (1 + h k / 2)^2N."""
    net = dense_net("residual", 1, 1, width=1, steps=4, time=TimeBasis("piecewise-constant", 4, 2))
    for layers, made in ((4, net), (8, deepened(net)), (12, deepened(net, 3))):
        evolution = next(made.evolutions())
        assert evolution.steps == layers and evolution.dynamics.time.order == layers
        assert len(evolution.dynamics.layer.module.operator.weight) == layers


def test_a_deeper_network_is_saved(tmp_path):
    x = torch.randn(3, 2)
    net = deepened(moved(dense_net("hamiltonian", 2, 3, steps=3)))
    pl.save(net, tmp_path / "dense")
    assert torch.equal(pl.load(tmp_path / "dense")(x), net(x))
    image = torch.randn(2, 1, 8, 8)
    for made in (pde_cnn("parabolic", channels=1, widths=(4, 4, 4)), imexnet(widths=(4,))):
        finer = deepened(moved(made)).eval()
        pl.save(finer, tmp_path / "images")
        assert torch.equal(pl.load(tmp_path / "images").eval()(image), finer(image))


@HOW
def test_networks_of_other_resolutions(how):
    net = moved(imexnet(widths=(3, 4), steps=2)).double()
    back = restricted(prolonged(net, how), how)
    x = torch.randn(1, 1, 8, 8).double()
    assert_close(back.eval()(x), net.eval()(x))
    layer = net.stages[1].dynamics.dynamics.layer.module.operator.weight
    finer = prolonged(net, how).stages[1].dynamics.dynamics.layer.module.operator.weight
    assert_close(finer, prolong_kernels(layer, how))


def test_galerkin_moves_a_classifier_to_fine_images():
    """A linear, pixel-wise periodic network: mean pixels of its output stay the same."""
    kernel = torch.randn(1, 1, 3, 3).double()
    fine = prolong_kernels(kernel)
    x = torch.randn(1, 1, 6, 6).double()
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def convolve(z, k):
        return nn.functional.conv2d(nn.functional.pad(z, (1, 1, 1, 1), mode="circular"), k)

    assert_close(nn.functional.avg_pool2d(convolve(big, fine), 2), convolve(x, kernel))


def test_networks_that_cannot_change():
    lean = ContinuousNet(None, Parabolic(LeanConv(3)), None)
    with pytest.raises(ArgumentError, match=r"full kernels .* LeanConv"):
        prolonged(lean)
    with pytest.raises(ArgumentError, match="3x3 or 1x1"):
        prolonged(ContinuousNet(nn.Conv2d(1, 3, 5), Parabolic(Conv(3)), None))
    adaptive = dense_net("residual", 2, 2, method="dopri5")
    next(adaptive.evolutions()).steps = None
    with pytest.raises(ArgumentError, match="adaptive"):
        deepened(adaptive)
    with pytest.raises(ArgumentError, match="`factor`"):
        deepened(adaptive, 0)


def rows(n=60):
    x = torch.randn(n, 2).double()
    return x, (x.norm(dim=1, keepdim=True) > 1.1).double()


def climb(objective):
    return objective.of(deepened(objective.model))


def test_work_units_and_files(tmp_path):
    net = dense_net("hamiltonian", 2, 2, width=4, steps=2)
    levels = [Level(6, 0.25), Level(4, 0.5), Level(2)]
    how = {"progress": False, "seed": 1}
    data = rows()
    first = multilevel(Classification(net), levels, climb, data, out=tmp_path / "run", **how)
    assert first.work == [1.5, 2.0, 2.0] and first.total_work == 5.5
    assert [run.steps for run in first.runs] == [6, 4, 2]
    assert next(first.objective.model.evolutions()).steps == 8
    assert first.history[-1]["work"] == 5.5 and first.history[-1]["step"] == 12
    work = [entry["work"] for entry in first.history]
    assert work == sorted(work)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log == first.history and {entry["level"] for entry in log} == {0, 1, 2}
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["total_work"] == 5.5 and len(metrics["levels"]) == 3
    x = torch.randn(5, 2)
    assert torch.equal(pl.load(tmp_path / "run")(x), first.objective.model(x))
    # Finished levels are read, not trained: other first weights would show.
    other = Classification(moved(dense_net("hamiltonian", 2, 2, width=4, steps=2)))
    again = multilevel(other, levels, climb, data, out=tmp_path / "run", resume=True, **how)
    assert torch.equal(again.objective.model(x), first.objective.model(x))
    with pytest.raises(ArgumentError, match="other levels"):
        multilevel(other, levels[:2], climb, data, out=tmp_path / "run", resume=True, **how)


def test_levels_start_from_the_weights_before():
    """One level of as many steps is `fit`, and the second begins where the first ended."""
    data = rows()
    seen = []

    def watch(objective):
        seen.append({k: v.clone() for k, v in objective.model.state_dict().items()})
        return objective.of(objective.model)

    net = dense_net("residual", 2, 2, width=4, steps=2)
    run = multilevel(Classification(net), [Level(5), Level(1)], watch, data, progress=False, seed=2)
    alone = dense_net("residual", 2, 2, width=4, steps=2)
    pl.fit(Classification(alone), data, max_steps=5, progress=False, seed=2)
    for name, value in alone.state_dict().items():
        assert torch.equal(seen[0][name], value)
    assert run.work == [5.0, 1.0]


def test_levels_of_resolution():
    """Coarse and fine images of the same classes."""
    labels = torch.randint(2, (40, 1)).double()
    coarse = torch.randn(40, 1, 4, 4).double() + 2 * labels.view(-1, 1, 1, 1)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    net = pde_cnn("parabolic", channels=1, classes=2, widths=(4, 4), steps=2)
    levels = [
        Level(20, 0.25, data=(coarse.flatten(1), labels)),
        Level(2, data=(fine.flatten(1), labels)),
    ]
    run = multilevel(
        Classification(net, shape=(1, 4, 4)),
        levels,
        lambda o: o.of(prolonged(o.model), (1, 8, 8)),
        levels[1].data,
        progress=False,
    )
    assert run.total_work == 7.0
    found = run.objective.model.eval()(fine.float()).argmax(1, keepdim=True)
    assert (found == labels).double().mean() > 0.8


def test_errors_of_levels(tmp_path):
    objective = Classification(dense_net("residual", 2, 2, width=4, steps=2))
    with pytest.raises(ArgumentError, match="`levels`"):
        multilevel(objective, [], climb, rows())
    with pytest.raises(ArgumentError, match=r"must be `Level`s, got \[3, 3\]"):
        multilevel(objective, [3, 3], climb, rows())
    with pytest.raises(ArgumentError, match="Level"):
        multilevel(objective, [Level(1)], climb, rows(), max_steps=3)
    with pytest.raises(ArgumentError, match="`resume` needs `out`"):
        multilevel(objective, [Level(1)], climb, rows(), resume=True)
    with pytest.raises(ArgumentError, match="`steps` must be a positive integer, got 0"):
        Level(0)
    with pytest.raises(ArgumentError, match="`cost` must be positive"):
        Level(1, 0.0)
