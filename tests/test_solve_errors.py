"""What goes wrong in a solve, and what the user is told about it."""

import math

import pytest
import torch

from pathline.errors import ArgumentError, PathlineError, ShapeError, SolveError
from pathline.integrate import METHODS, Status, odeint

F64 = torch.float64
T = torch.tensor([0.0, 1.0], dtype=F64)
Y = torch.ones(3, 2, dtype=F64)
NAN, INF = math.nan, math.inf


class Counting:
    """A velocity that counts its evaluations."""

    def __init__(self, func):
        self.func, self.count = func, 0

    def __call__(self, t, y):
        self.count += 1
        return self.func(t, y)


def refuses(words, func=lambda t, y: -y, y0=Y, t=T, *, error=ArgumentError, **how):
    """The solve is refused with these words, before the second evaluation, by an own error."""
    v = Counting(func)
    with pytest.raises((ArgumentError, ShapeError), match=words) as caught:
        odeint(v, y0, t, **how)
    assert isinstance(caught.value, error)
    assert v.count <= 1
    return str(caught.value)


METHODS_TRIED = ["dopri5", "rk4", "kencarp4", "gl4"]


# What the velocity returns


@pytest.mark.parametrize("batch", ["shared", "independent"])
@pytest.mark.parametrize("method", METHODS_TRIED)
def test_the_velocity_returns_another_shape(method, batch):
    for func in (
        lambda t, y: y[:1],
        lambda t, y: y.sum(),
        lambda t, y: y[..., None],
        lambda t, y: y.T,
    ):
        words = r"velocity must return the shape of the state, \(3, 2\), got"
        refuses(words, func, error=ShapeError, method=method, batch=batch)


@pytest.mark.parametrize("method", METHODS_TRIED)
def test_the_velocity_returns_another_dtype(method):
    refuses(r"velocity.*torch.float64.*torch.float32", lambda t, y: y.float(), method=method)
    refuses(r"velocity.*torch.complex128", lambda t, y: y + 0j, method=method)
    refuses("velocity must return", lambda t, y: y.detach().numpy(), method=method)
    refuses("velocity must return", lambda t, y: None, method=method)


@pytest.mark.parametrize("method", METHODS_TRIED)
def test_the_velocity_returns_another_structure(method):
    tree = {"a": Y, "b": Y[:, :1]}
    for func in (
        lambda t, y: y["a"],
        lambda t, y: {"a": y["a"]},
        lambda t, y: {"a": y["a"], "c": y["b"]},
        lambda t, y: {"a": y["b"], "b": y["a"]},
        lambda t, y: {"a": y["a"], "b": 1.0},
        lambda t, y: None,
    ):
        refuses("velocity must return", func, tree, method=method, error=PathlineError)


# States and times


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize(
    "y0, words",
    [
        (torch.ones(2, dtype=torch.long), "`y0`.*floating point or complex"),
        (torch.ones(2, dtype=torch.bool), "`y0`.*floating point or complex"),
        (torch.tensor([1.0, NAN]), "`y0` must be finite"),
        (torch.tensor([1.0, INF]), "`y0` must be finite"),
        ((torch.ones(2), torch.tensor([NAN])), "`y0` must be finite"),
        (1.0, "`y0` must be a tensor"),
        ((), "`y0` must be a tensor"),
        ([torch.ones(2), 1.0], "`y0` must be a tensor"),
        (None, "`y0` must be a tensor"),
    ],
)
def test_states(y0, words, method):
    refuses(words, y0=y0, method=method)


def test_states_of_several_dtypes():
    """One dtype for all leaves, since all are integrated together."""
    refuses("`y0`", lambda t, y: y, (torch.ones(2), torch.ones(2, dtype=F64)))
    refuses("`y0`", lambda t, y: y, (torch.ones(2), torch.ones(2, dtype=torch.long)))


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize(
    "t, words",
    [
        (torch.tensor([0.0, 1.0, 0.5]), "`t` must be strictly increasing or decreasing"),
        (torch.tensor([1.0, 0.0, 0.5]), "`t` must be strictly increasing or decreasing"),
        (torch.tensor([0.0, 0.0]), "`t` must be strictly increasing or decreasing"),
        (torch.tensor([0.0, 1.0, 1.0]), "`t` must be strictly increasing or decreasing"),
        (torch.tensor([0.0, NAN]), "`t` must be finite"),
        (torch.tensor([0.0, INF]), "`t` must be finite"),
        (torch.tensor([]), "`t` must be"),
        (torch.tensor(1.0), "`t` must be"),
        (torch.ones(1, 1, 2), "`t` must be"),
        (torch.tensor([0, 1]), "`t` must be of a floating point type"),
        (torch.tensor([0j, 1]), "`t` must be of a floating point type"),
        ("01", "`t` must be"),
        (None, "`t` must be"),
        (torch.tensor([[0.0, 1.0], [0.0, 2.0]]), "`t` of shape.*row for each sample"),
        (torch.tensor([[0.0, 1.0, 0.5]] * 3), "`t` must be finite and strictly.*row 0"),
        (torch.tensor([[0.0, 1.0], [0.0, NAN], [0.0, 1.0]]), "`t` must be finite.*row 1"),
    ],
)
def test_times(t, words, method):
    refuses(words, t=t, method=method, error=PathlineError)


ROWS = torch.tensor([[0.0, 0.5, 1.0]] * 3, dtype=F64)


@pytest.mark.parametrize(
    "t, mask, words",
    [
        (T, torch.ones(2, dtype=torch.bool), "`mask` goes with times of shape"),
        (ROWS, torch.ones(3, 2, dtype=torch.bool), "`mask` must be a bool tensor of the shape"),
        (ROWS, torch.ones(3, 3), "`mask` must be a bool tensor"),
        (ROWS, torch.zeros(3, 3, dtype=torch.bool), "`mask` must be True from the first"),
        (ROWS, torch.tensor([[True, False, True]] * 3), "`mask` must be True from the first"),
        (ROWS, [[True] * 3] * 3, "`mask` must be a bool tensor"),
    ],
)
def test_masks(t, mask, words):
    for method in ("dopri5", "rk4"):
        refuses(words, t=t, mask=mask, method=method)


# Names


@pytest.mark.parametrize(
    "how, words",
    [
        ({"method": "dopri6"}, "unknown `method` 'dopri6'; did you mean 'dopri[58]'"),
        ({"method": "RK4"}, "unknown `method` 'RK4'.*known:.*rk4"),
        ({"method": 4}, "unknown `method`"),
        ({"gradient": "checkpoints"}, "unknown `gradient`.*did you mean 'checkpoint'"),
        ({"gradient": None}, "unknown `gradient`"),
        ({"batch": "independant"}, "unknown `batch`.*did you mean 'independent'"),
        ({"options": {"stepsize": 0.1}, "method": "rk4"}, "'stepsize'.*did you mean 'step_size'"),
        ({"options": {"max_steps": 1}}, "'max_steps' of method 'dopri5'; did you mean"),
        ({"options": {"first_step": 1.0}, "method": "rk4"}, "'first_step' of method 'rk4'"),
        ({"options": {"interp": "quintic", "step_size": 0.1}, "method": "rk4"}, "`interp`"),
        ({"gradient": "reversible"}, "needs a reversible method.*got 'dopri5'.*checkpoint"),
        ({"method": "scipy_solver", "options": {"solve": "RK45"}}, "did you mean 'solver'"),
    ],
)
def test_names(how, words):
    refuses(words, **how)


def test_functions():
    for func in (None, torch.ones(2), "rk4"):
        with pytest.raises(ArgumentError, match="`func` must be callable"):
            odeint(func, Y, T)


# Numbers


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize(
    "value",
    [
        *(-1e-3, NAN, INF, "1e-3", None, {}),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([NAN, 1.0]),
        torch.ones(5),
        torch.ones(2, requires_grad=True),
    ],
)
def test_tolerances(name, value):
    for how in ({"method": "dopri5"}, {"method": "kencarp4"}, {"batch": "independent"}):
        refuses(f"`{name}`", **{name: value}, **how)


def test_tolerances_together():
    refuses("`rtol` and `atol` must not both be zero", rtol=0.0, atol=0.0)
    zero = torch.tensor([0.0, 1.0])
    refuses("`rtol` and `atol` must not both be zero", rtol=zero, atol=zero)
    refuses("`rtol` must have one entry for each of the 1 tensors", rtol=(1e-3, 1e-3))
    pair = (Y, Y)
    refuses("`atol` must have one entry for each of the 2 tensors", y0=pair, atol=(1e-3,))
    refuses("`rtol`", y0=pair, rtol=(1e-3, torch.ones(7)))
    refuses("`rtol`", y0=pair, rtol=(1e-3, -1.0))


@pytest.mark.parametrize("name", ["min_step", "max_step", "max_num_steps", "first_step", "safety"])
@pytest.mark.parametrize("value", [-1.0, NAN, "much"])
def test_numbers_of_adaptive_steps(name, value):
    refuses(f"'{name}'", options={name: value})


def test_more_of_adaptive_steps():
    refuses("'max_num_steps'", options={"max_num_steps": 0})
    refuses("'first_step'", options={"first_step": 0.0})
    refuses("`min_step`", options={"min_step": 1.0, "max_step": 0.5})
    refuses("`step_t`", options={"step_t": torch.tensor([0.5, NAN])})
    refuses("`jump_t`", options={"jump_t": torch.tensor([0.5, 0.5])})
    both = {"jump_t": torch.tensor([0.5]), "step_t": torch.tensor([0.5])}
    refuses("`step_t` and `jump_t` must not share", options=both)
    for name in ("step_t", "jump_t"):
        refuses(name, options={name: torch.tensor([0.5])}, batch="independent")
    refuses("`norm`", options={"norm": lambda z: z.abs().max()}, batch="independent")
    odeint(lambda t, y: -y, Y, T, options={"max_num_steps": INF, "max_step": INF})


def test_numbers_of_fixed_steps():
    for value in (0.0, -0.1, NAN, "small", INF):
        refuses("'step_size'", method="rk4", options={"step_size": value})
        refuses("'step_size'", method="rk4", t=ROWS, options={"step_size": value})
    grid = {"grid_constructor": lambda f, y, t: t, "step_size": 0.1}
    refuses("`step_size` or `grid_constructor`, not both", method="rk4", options=grid)
    for nodes, words in (
        (torch.tensor([0.0, 0.5]), "must begin at t.0. and end at t.-1."),
        (torch.tensor([0.0, 0.7, 0.5, 1.0]), "must be strictly increasing"),
        (torch.tensor([0.0, NAN, 1.0]), "must be finite"),
    ):
        grid = {"grid_constructor": lambda f, y, t, nodes=nodes: nodes}
        refuses(f"`grid_constructor`.*{words}", method="rk4", options=grid)


@pytest.mark.parametrize(
    "how, words",
    [
        ({"memory": "much"}, "`memory` must be a size such as"),
        ({"memory": "5 parsecs"}, "`memory` must be a size such as"),
        ({"memory": -1}, "`memory` must be a size such as"),
        ({"memory": 0}, "`memory` must be a size such as"),
        ({"memory": NAN}, "`memory` must be a size such as"),
        ({"memory": "infMB"}, "`memory` must be a size such as"),
        ({"segments": 0}, "`segments` must be"),
        ({"segments": -3}, "`segments` must be"),
        ({"segments": 2.5}, "`segments` must be"),
        ({"segments": "2"}, "`segments` must be"),
        ({"segments": 2, "memory": "1MB"}, "`memory` or `segments`, not both"),
        ({"segments": 2, "gradient": "discrete"}, "`memory` and `segments` go with"),
        ({"memory": "1MB", "gradient": "adjoint"}, "`memory` and `segments` go with"),
    ],
)
def test_memory(how, words):
    for method in ("dopri5", "rk4"):
        refuses(words, **{"gradient": "checkpoint", "method": method, **how})


def test_too_little_memory():
    y0 = Y.clone().requires_grad_()
    with pytest.raises(ArgumentError, match=r"`memory` must hold one state and one step.*got 100"):
        odeint(lambda t, y: y.sin(), y0, T, gradient="checkpoint", memory=100)


# Combinations


def test_combinations():
    def event(t, y):
        return y[0, 0] - 0.5

    refuses("`event_fn` with a method of fixed steps.*`step_size`", method="rk4", event_fn=event)
    refuses("`t` must be .start.*`event_fn`", t=ROWS[0], event_fn=event)
    refuses("`event_fn`", batch="independent", event_fn=event)
    refuses("`event_fn`", method="scipy_solver", event_fn=event)
    refuses('batch="independent" needs a batch axis', y0=torch.tensor(1.0), batch="independent")
    refuses('gradient="adjoint"', t=ROWS, gradient="adjoint")
    refuses('gradient="adjoint"', batch="independent", gradient="adjoint")
    refuses('gradient="adjoint"', quadrature=lambda t, y, dy: y[:, 0], gradient="adjoint")
    ragged = (torch.ones(3), torch.ones(2))
    refuses("`y0` must have one batch size", y0=ragged, batch="independent")
    refuses("needs a pair", method="leapfrog", options={"step_size": 0.1})


def test_rates_of_wrong_kinds():
    for q in (lambda t, y, dy: 1.0, lambda t, y, dy: [y[:, 0], 2]):
        refuses("`quadrature` must return", quadrature=q, error=ShapeError)


def test_errors_of_the_velocity_pass_through():
    class Own(Exception):
        pass

    def fail(t, y):
        raise Own("mine")

    for method in METHODS_TRIED:
        for gradient in ("discrete", "checkpoint", "adjoint"):
            with pytest.raises(Own, match="mine"):
                odeint(fail, Y.clone().requires_grad_(), T, method=method, gradient=gradient)


# Failures


def pair_of(func, y0, t, **how):
    """The solution that failed; without `solution=True` the same words are raised."""
    solution = odeint(func, y0, t, solution=True, **how)
    assert not solution.success
    with pytest.raises(SolveError) as caught:
        odeint(func, y0, t, **how)
    assert str(caught.value) == solution.reason
    with pytest.raises(SolveError):
        solution.or_raise()
    return solution


BATCHES = ["shared", "independent"]


@pytest.mark.parametrize("batch", BATCHES)
def test_step_limit(batch):
    t = torch.tensor([0.0, 0.01, 10.0], dtype=F64)
    how = {"options": {"max_num_steps": 20}, "batch": batch, "rtol": 1e-9}
    solution = pair_of(lambda t, y: torch.cos(9 * t) * y, Y, t, **how)
    assert (solution.status == Status.STEP_LIMIT).all()
    assert "max_num_steps" in solution.reason
    assert torch.isfinite(solution.values[:2]).all()
    assert torch.isnan(solution.values[2]).all()
    time, state = solution.last
    assert (time > 0).all() and (time < 10).all() and torch.isfinite(state).all()
    flat = time.reshape(-1, 1) if time.ndim else time
    want = Y * torch.exp(torch.sin(9 * flat) / 9)
    torch.testing.assert_close(state, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "kencarp4"])
@pytest.mark.parametrize("batch", BATCHES)
def test_blow_up(batch, method):
    """y' = y^2 has its pole at 1 / y0."""
    t = torch.tensor([0.0, 0.2, 1.0], dtype=F64)
    y0 = torch.tensor([[2.0]], dtype=F64)
    rtol = 1e-3 if method in ("bosh3", "kencarp4") else 1e-6
    solution = pair_of(lambda t, y: y * y, y0, t, batch=batch, method=method, rtol=rtol)
    kinds = (Status.STEP_TOO_SMALL, Status.NOT_FINITE, Status.STEP_LIMIT, Status.NOT_CONVERGED)
    assert int(solution.status) in kinds
    assert "t = 0.5" in solution.reason or "t = 0.499" in solution.reason
    torch.testing.assert_close(
        solution.values[1], torch.tensor([[10 / 3]], dtype=F64), rtol=20 * rtol, atol=0
    )
    assert torch.isnan(solution.values[2]).all()
    time, state = solution.last
    assert float(time) == pytest.approx(0.5, rel=1e-2)
    assert torch.isfinite(state).all()


def faulty(t, y):
    """Sample 1 turns NaN from t = 0.5 on."""
    bad = torch.zeros_like(y)
    bad[1] = torch.where((t[1, 0] if t.ndim else t) > 0.5, NAN, 0.0)
    return -y + bad


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "kencarp4", "dopri8"])
def test_a_velocity_that_turns_nan(method, batch):
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    solution = pair_of(faulty, Y, t, method=method, batch=batch, rtol=1e-5)
    assert "sample 1" in solution.reason and "not finite" in solution.reason
    assert "t = 0.5" in solution.reason or "t = 0.49999" in solution.reason
    failed = solution.status if batch == "shared" else solution.status[1]
    assert int(failed) == Status.NOT_FINITE
    torch.testing.assert_close(solution.values[1], Y * math.exp(-0.3), rtol=1e-4, atol=0)
    end = solution.values[2]
    if batch == "shared":
        assert torch.isnan(end).all()
    else:
        assert torch.isnan(end[1]).all()
        torch.testing.assert_close(end[::2], Y[::2] * math.exp(-1.0), rtol=1e-4, atol=0)
    times, state = solution.last
    assert torch.isfinite(state).all()
    assert float(times if batch == "shared" else times[1]) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["rk4", "euler", "explicit_adams", "dopri5", "gl4"])
def test_fixed_steps_through_nan(method, gradient):
    """The solve says at which step and for which sample; what came before is kept."""
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    how = {"method": method, "options": {"step_size": 0.05}, "gradient": gradient}
    solution = pair_of(faulty, Y.clone().requires_grad_(), t, **how)
    assert int(solution.status) in (Status.NOT_FINITE, Status.NOT_CONVERGED)
    if method != "gl4":
        assert "sample 1" in solution.reason
    assert any(f"t = {word}" in solution.reason for word in ("0.45", "0.5", "0.55"))
    assert torch.isfinite(solution.values[:2]).all()
    assert torch.isnan(solution.values[2]).all()
    time, state = solution.last
    assert 0.4 < float(time) < 0.6 and torch.isfinite(state).all()


def test_nan_at_the_first_evaluation():
    for method in ("dopri5", "rk4"):
        solution = pair_of(lambda t, y: y * NAN, Y, T, method=method)
        assert "t = 0" in solution.reason
        assert torch.equal(solution.values[0], Y)
        assert torch.isnan(solution.values[1]).all()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_stiffness(method, batch):
    """Prothero and Robinson's problem: smooth solution, slope of -1e5."""

    def v(t, y):
        return -1e5 * (y - torch.cos(t)) - torch.sin(t)

    how = {"method": method, "batch": batch, "options": {"max_num_steps": 300}, "rtol": 1e-5}
    y0 = torch.ones(2, 1, dtype=F64)
    solution = pair_of(v, y0, torch.tensor([0.0, 10.0], dtype=F64), **how)
    assert (solution.status == Status.STIFF).all()
    assert "stiff" in solution.reason and 'method="kencarp4"' in solution.reason
    assert "kencarp4" in METHODS
    good = odeint(v, y0, torch.tensor([0.0, 10.0], dtype=F64), method="kencarp4", rtol=1e-5)
    torch.testing.assert_close(good[-1], torch.full_like(y0, math.cos(10.0)), rtol=0, atol=1e-3)


def test_a_long_but_not_stiff_solve_is_not_called_stiff():
    how = {"options": {"max_num_steps": 100}}
    solution = pair_of(
        lambda t, y: torch.stack([y[1], -y[0]]),
        torch.tensor([1.0, 0.0], dtype=F64),
        torch.tensor([0.0, 1e4], dtype=F64),
        **how,
    )
    assert int(solution.status) == Status.STEP_LIMIT


@pytest.mark.parametrize("batch", BATCHES)
def test_tolerance_below_round_off(batch):
    """float32 cannot hold 1e-12."""
    y0 = torch.tensor([[1.0, 0.0]])

    def v(t, y):
        return torch.stack([y[:, 1], -y[:, 0]], -1) * (1 + y.square().sum(-1, keepdim=True)).sin()

    t = torch.tensor([0.0, 5.0])
    how = {"options": {"max_num_steps": 400}}
    solution = pair_of(v, y0, t, rtol=1e-12, atol=1e-14, batch=batch, **how)
    assert (solution.status == Status.TOLERANCE).all()
    assert "float64" in solution.reason
    good = odeint(v, y0.double(), t.double(), rtol=1e-9, atol=1e-11, batch=batch)
    assert torch.isfinite(good).all()


def test_newton_that_fails_in_fixed_steps():
    """A jumping velocity has no implicit step near its jump."""

    def v(t, y):
        return torch.where(y > 0.5, -1e6, 1e6) * torch.ones_like(y)

    solution = pair_of(
        v, torch.tensor([0.4], dtype=F64), T, method="implicit_euler", options={"step_size": 0.1}
    )
    assert int(solution.status) == Status.NOT_CONVERGED
    assert "Newton" in solution.reason


def test_no_event():
    def never(t, y):
        return y[0, 0] + 1.0

    how = {"event_fn": never, "options": {"max_num_steps": 30}}
    with pytest.raises(SolveError, match="no event happened"):
        odeint(lambda t, y: -y, Y, T, **how)
    solution = odeint(lambda t, y: -y, Y, T, solution=True, **how)
    assert int(solution.status) == Status.NO_EVENT and not solution.success
    assert torch.isfinite(solution.last[1]).all()


def test_integrals_of_a_failed_solve_are_nan_where_not_reached():
    t = torch.tensor([0.0, 0.2, 1.0], dtype=F64)
    for how in ({}, {"batch": "independent"}, {"method": "rk4", "options": {"step_size": 0.05}}):
        solution = odeint(faulty, Y, t, quadrature=lambda t, y, dy: y[:, 0], solution=True, **how)
        reached, lost = solution.integrals[1], solution.integrals[2]
        torch.testing.assert_close(reached, Y[:, 0] * (1 - math.exp(-0.2)), rtol=1e-5, atol=0)
        assert torch.isnan(lost[1])
        if how.get("batch"):
            assert torch.isfinite(lost[::2]).all()


def test_atol_zero_and_a_zero_in_the_state():
    """The scale of the error is zero at the start, and not afterwards."""
    y0 = torch.zeros(2, 1, dtype=F64)
    for batch in BATCHES:
        y = odeint(lambda t, y: torch.ones_like(y), y0, T, atol=0.0, rtol=1e-6, batch=batch)
        torch.testing.assert_close(y[-1], torch.ones_like(y0), rtol=1e-6, atol=0)


def test_newton_fails_before_an_event():
    """Implicit steps of fixed length that can't be made end the search with a reason."""
    how = {
        "method": "implicit_euler",
        "options": {"step_size": 0.125},
        "event_fn": lambda t, y: y.sum() + 100,
    }
    v, y0, t = lambda t, y: NAN - y if t >= 0.5 else -y, torch.ones(2, dtype=F64), [0.0, 1.0]
    solution = odeint(v, y0, t, solution=True, **how)
    assert int(solution.status) == Status.NOT_CONVERGED
    assert float(solution.last[0]) == 0.375
    torch.testing.assert_close(solution.last[1], y0 / 1.125**3, rtol=1e-12, atol=0)
    with pytest.raises(SolveError, match=r"t = 0\.375.*Newton"):
        odeint(v, y0, t, **how)


def test_large_states_whose_sum_overflows_are_finite():
    y0 = torch.full((8,), 3e38)
    assert not torch.isfinite(y0.sum())
    assert odeint(lambda t, y: -y, y0, T, method="euler")[-1].eq(0).all()
