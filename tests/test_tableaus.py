"""Coefficients of Runge-Kutta methods against the order conditions of rooted trees.

A method has order p if sum_i b_i phi_i(tree) = 1 / gamma(tree) for every rooted tree of at most p
nodes, and an additive one if that holds for every colouring of the nodes by its halves (Hairer,
Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, sections II.2 and II.15).
"""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from pathline.errors import ArgumentError
from pathline.integrate import tableaus
from pathline.integrate.tableaus import EULER, GL4, RK4, TRAPEZOID, ImexTableau, Tableau

PAIRS = [value for value in vars(tableaus).values() if isinstance(value, ImexTableau)]
METHODS = {
    method.name: method
    for value in vars(tableaus).values()
    if isinstance(value, Tableau | ImexTableau)
    for method in ([value] if isinstance(value, Tableau) else [value.explicit, value.implicit])
}
IMPLICIT = [name for name, method in METHODS.items() if not method.explicit]
EMBEDDED = {  # orders of the embedded methods
    "adaptive_heun": 1,
    "fehlberg2": 1,
    "bosh3": 2,
    "tsit5": 4,
    "dopri5": 4,
    "dopri8": 7,
    "kencarp3": 2,
    "kencarp4": 3,
    "kencarp5": 4,
    "ark3_explicit": 2,
    "ark4_explicit": 3,
    "ark5_explicit": 4,
}
MIDDLE = {"tsit5": 4, "dopri5": 4, "dopri8": 5}  # orders of z(t + dt/2)
L_STABLE = {
    *("implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2"),
    *("kencarp3", "kencarp4", "kencarp5"),
    *("imex_euler_implicit", "ars222_implicit", "ars443_implicit"),
}


# A tree is the colour of its root and the sorted tuple of the trees that hang on it.


def grow(tree, colours):
    """The trees with one leaf more."""
    root, children = tree
    for colour in range(colours):
        yield root, tuple(sorted((*children, (colour, ()))))
    for i, child in enumerate(children):
        for grown in grow(child, colours):
            yield root, tuple(sorted((*children[:i], grown, *children[i + 1 :])))


@cache
def trees(order, colours=1):
    """All rooted trees with `order` nodes."""
    if order == 1:
        return tuple((colour, ()) for colour in range(colours))
    smaller = trees(order - 1, colours)
    return tuple(sorted({grown for tree in smaller for grown in grow(tree, colours)}))


@cache
def size(tree):
    return 1 + sum(size(child) for child in tree[1])


@cache
def density(tree):
    return size(tree) * math.prod(density(child) for child in tree[1])


def matrix(method):
    a = np.zeros((method.stages, method.stages))
    for i, row in enumerate(method.a):
        a[i, : len(row)] = row
    return a


def worst(halves, weights, order, theta=1.0):
    """The largest violation of a condition with exactly `order` nodes at time t + theta dt."""
    matrices = [matrix(half) for half in halves]
    weights = np.array(weights)

    @cache
    def phi(tree):
        products = [matrices[child[0]] @ phi(child) for child in tree[1]]
        return np.prod([np.ones(weights.shape[1]), *products], axis=0)

    return max(
        abs(weights[tree[0]] @ phi(tree) - theta**order / density(tree))
        for tree in trees(order, len(halves))
    )


def has_order(halves, weights, order, theta=1.0):
    """Whether the order is `order`, no less (to rounding) and no more."""
    kept = max(worst(halves, weights, n, theta) for n in range(1, order + 1))
    return kept < 1e-12 and worst(halves, weights, order + 1, theta) > 1e-7


def stability(method, z):
    """R(z): the factor by which a step multiplies z0 if v is lambda z and z = lambda dt."""
    ones = np.ones(method.stages)
    return 1 + z * (method.b @ np.linalg.solve(np.eye(method.stages) - z * matrix(method), ones))


def test_trees_are_counted():
    # https://oeis.org/A000081, and twice https://oeis.org/A000151.
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert [len(trees(n, 2)) for n in range(1, 7)] == [2, 4, 14, 52, 214, 916]
    assert sorted(density(tree) for tree in trees(4)) == [4, 8, 12, 24]


@pytest.mark.parametrize("name", METHODS)
def test_order(name):
    method = METHODS[name]
    assert has_order([method], [method.b], method.order)


@pytest.mark.parametrize("name", METHODS)
def test_embedded_order(name):
    method = METHODS[name]
    assert (method.b_err is not None) == (name in EMBEDDED)
    if method.b_err is not None:
        assert max(map(abs, method.b_err)) > 1e-4
        assert has_order([method], [np.subtract(method.b, method.b_err)], EMBEDDED[name])


@pytest.mark.parametrize("name", METHODS)
def test_middle(name):
    method = METHODS[name]
    assert (method.b_mid is not None) == (name in MIDDLE)
    if method.b_mid is not None:
        assert has_order([method], [method.b_mid], MIDDLE[name], theta=0.5)
        # The middle of the cubic Hermite interpolant, which it must beat, has order three.
        ends = np.zeros((2, method.stages))
        ends[[0, 1], [0, -1]] = 1
        assert method.fsal
        hermite = np.array(method.b) / 2 + (ends[0] - ends[1]) / 8
        assert has_order([method], [hermite], 3, theta=0.5)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_coupling(pair):
    halves = [pair.explicit, pair.implicit]
    assert has_order(halves, [half.b for half in halves], pair.order)
    if pair.explicit.b_err is not None:
        assert pair.explicit.b_err == pair.implicit.b_err
        embedded = np.subtract(pair.explicit.b, pair.explicit.b_err)
        assert has_order(halves, [embedded, embedded], EMBEDDED[pair.implicit.name])


def test_a_wrong_digit_is_noticed():
    row = (44 / 45, -56 / 15 + 1e-9, 32 / 9 - 1e-9)
    wrong = replace(tableaus.DOPRI5, a=(*tableaus.DOPRI5.a[:3], row, *tableaus.DOPRI5.a[4:]))
    assert not has_order([wrong], [wrong.b], 5)
    assert not has_order([RK4], [RK4.b], 3)
    assert not has_order([RK4], [RK4.b], 5)


@pytest.mark.parametrize("name", IMPLICIT)
def test_a_stability(name):
    # |R| <= 1 on the imaginary axis and no poles to the left of it: so |R| <= 1 on the left half.
    method = METHODS[name]
    assert np.linalg.eigvals(matrix(method)).real.min() >= 0
    grid = np.geomspace(1e-3, 1e6, 400)
    assert max(abs(stability(method, 1j * y)) for y in grid) <= 1 + 1e-10


@pytest.mark.parametrize("name", IMPLICIT)
def test_l_stability(name):
    far = abs(stability(METHODS[name], -1e6))
    if name in L_STABLE:
        assert METHODS[name].fsal
        assert far < 1e-5
    else:
        assert far == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_stability_function_approximates_exp(name):
    method = METHODS[name]
    dt = 0.1
    leading = dt ** (method.order + 1)
    assert abs(stability(method, dt) - math.exp(dt)) < leading + 1e-14


def test_kinds():
    kinds = {
        name: "explicit" if method.explicit else "diagonal" if method.diagonal else "full"
        for name, method in METHODS.items()
    }
    full = {"radauIIA3", "radauIIA5", "gl4", "gl6"}
    assert {name for name, kind in kinds.items() if kind == "full"} == full
    diagonal = {"implicit_euler", "implicit_midpoint", "trapezoid", *L_STABLE} - full
    assert {name for name, kind in kinds.items() if kind == "diagonal"} == diagonal
    fsal = {name for name, method in METHODS.items() if method.fsal}
    explicit = {name for name in fsal if kinds[name] == "explicit"}
    assert fsal - explicit == {"trapezoid", *L_STABLE}
    assert explicit == {
        *("bosh3", "tsit5", "dopri5", "dopri8"),
        *("imex_euler_explicit", "ars222_explicit", "ars443_explicit"),
    }
    assert (RK4.stages, GL4.stages, tableaus.DOPRI8.stages) == (4, 2, 14)
    assert len(METHODS) == len({id(method) for method in METHODS.values()})


def test_the_embedded_step_of_fehlberg_is_his_last_stage():
    # No order condition of a second-order method sees the row of its last stage.
    method = METHODS["fehlberg2"]
    assert np.subtract(method.b, method.b_err) == pytest.approx([*method.a[2], 0.0], abs=1e-16)


def test_fully_implicit_nodes_are_quadrature_points():
    for name, nodes in {"gl4": 2, "gl6": 3}.items():
        points, weights = np.polynomial.legendre.leggauss(nodes)
        assert METHODS[name].c == pytest.approx((points + 1) / 2, abs=1e-15)
        assert METHODS[name].b == pytest.approx(weights / 2, abs=1e-15)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"a": ((), (0.5,), (0.0, 0.5))}, "as many rows in `a`"),
        ({"c": (0.0, 0.5, 1.0)}, "as many rows in `a`"),
        ({"b_err": ()}, "as many rows in `a`"),
        ({"b_mid": (0.5,)}, "as many rows in `a`"),
        ({"a": ((), (0.5, 0.0), (0.0, 0.5), (0.0, 0.0, 1.0))}, r"have \[0, 2, 2, 3\] entries"),
        ({"a": ((), (0.5,), (0.25, 0.5), (0.0, 0.0, 1.0))}, r"`a\[2\]` .* must sum to 0.5"),
        ({"c": (0.0, 0.5, 0.5, 1.0 + 2e-12)}, r"`a\[3\]` .* must sum to 1"),
        ({"c": (0.0, 0.5, math.nan, 1.0)}, r"`a\[2\]` .* must sum to nan"),
        ({"b": (0.5, 0.5, 0.5, 0.5)}, "`b` .* must sum to 1.0, got 2.0"),
        ({"b_err": (0.5, 0.0, 0.0, 0.0)}, "`b_err` .* must sum to 0.0"),
        ({"b_mid": (1.0, 0.0, 0.0, 0.0)}, "`b_mid` .* must sum to 0.5"),
    ],
)
def test_bad_tableaus_are_refused(change, text):
    with pytest.raises(ArgumentError, match=text) as error:
        replace(RK4, **change)
    assert "the tableau 'rk4'" in str(error.value)


def test_an_empty_tableau_is_refused():
    with pytest.raises(ArgumentError, match="at least 1"):
        Tableau("nothing", order=0, a=(), b=(), c=())


def test_bad_pairs_are_refused():
    heun = METHODS["heun2"]
    with pytest.raises(ArgumentError, match="'p' needs an explicit and a diagonally implicit"):
        ImexTableau("p", order=2, explicit=TRAPEZOID, implicit=heun)
    with pytest.raises(ArgumentError, match="'p' needs an explicit and a diagonally implicit"):
        ImexTableau("p", order=2, explicit=heun, implicit=GL4)
    with pytest.raises(ArgumentError, match="same `c`"):
        ImexTableau("p", order=2, explicit=heun, implicit=METHODS["sdirk2"])
    with pytest.raises(ArgumentError, match="same `c`"):
        ImexTableau("p", order=1, explicit=EULER, implicit=TRAPEZOID)
    with pytest.raises(ArgumentError, match="higher order than its halves"):
        ImexTableau("p", order=3, explicit=heun, implicit=TRAPEZOID)
    assert ImexTableau("p", order=2, explicit=heun, implicit=TRAPEZOID).order == 2
