"""Running quantities that do not feed back into the state: dI/dt = q(t, z, dz)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ShapeError
from .dense import Scalar, combine
from .field import Field
from .tableaus import Tableau

Rates = tuple[Tensor, ...]
At = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Rates]]

# Lobatto's rules share their ends with the neighbouring steps: inner points and weights.
LOBATTO: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    2: ((), (1 / 2, 1 / 2)),
    4: ((0.5,), (1 / 6, 4 / 6, 1 / 6)),
    6: ((0.5 - 0.05**0.5, 0.5 + 0.05**0.5), (1 / 12, 5 / 12, 5 / 12, 1 / 12)),
}


def _lengths(dt: Scalar) -> Scalar:
    """The step lengths beside integrals of shape (batch,), in place of beside states."""
    return dt.flatten() if isinstance(dt, Tensor) and dt.ndim else dt


class Quadrature:
    """Integrates rates along a solution, at the order of its method.

    The state does not depend on the integrals, so they need no Runge-Kutta stages: Lobatto's
    rule on the ends of the step and on one or two points of the interpolant has the order of
    the method up to five. Beyond, the stages and weights of the method itself are used.

    Args:
        at: callable `(t, z, dz) -> (dz, rates)`, where `dz` may be None.
        tableau: of the method that moves z, None where it has none.
        order: of that method.
    """

    def __init__(self, at: At, tableau: Tableau | None, order: int) -> None:
        self.at = at
        self.tableau = tableau
        self.staged = tableau is not None and (order > 5 or (order > 4 and tableau.b_mid is None))
        self.points, self.weights = LOBATTO[2 if order <= 2 else 4 if order <= 4 else 6]

    def evaluation_weights(self, lengths: Sequence[float]) -> Iterator[float]:
        """What each evaluation of the rates counts in the integrals over steps of these lengths,
        in the order of `FixedMarch`: the start, then of each step its end and its inner points."""
        assert not self.staged, "the stages' own weights are not Lobatto's"
        first, *inner, last = self.weights
        yield first * lengths[0]
        for dt, following in zip(lengths, [*lengths[1:], 0.0], strict=True):
            yield last * dt + first * following
            for weight in inner:
                yield weight * dt

    def advance(
        self,
        sums: Rates,
        first: Rates,
        last: Rates,
        inside: Callable[[float], tuple[Tensor, Tensor]],
        dt: Scalar,
    ) -> Rates:
        """The integrals after a step, by Lobatto's rule; `inside(x)` is (t, z) at the share x."""
        inner = [self.at(*inside(x), None)[1] for x in self.points]
        columns = zip(first, *inner, last, strict=True)
        dt = _lengths(dt)
        return tuple(
            combine(total, self.weights, column, dt)
            for total, column in zip(sums, columns, strict=True)
        )

    def until(
        self,
        share: Scalar,
        sums: Rates,
        first: Rates,
        inside: Callable[[Scalar], tuple[Tensor, Tensor]],
        dt: Scalar,
    ) -> Rates:
        """The integrals at a share of a step, by Lobatto's rule on the part before it."""
        dt = _lengths(dt)
        inner = [self.at(*inside(share * x), None)[1] for x in (*self.points, 1.0)]
        columns = zip(first, *inner, strict=True)
        return tuple(
            combine(total, self.weights, column, share * dt)
            for total, column in zip(sums, columns, strict=True)
        )

    def advance_staged(
        self,
        sums: Rates,
        first: Rates,
        ts: Sequence[Tensor],
        z: Tensor,
        slopes: Sequence[Tensor],
        dt: Scalar,
    ) -> Rates:
        """The integrals after a step, by the weights of the method on its own stages."""
        assert self.tableau is not None
        lengths = _lengths(dt)
        # Implicit methods have the start of the step in front of the times of their stages.
        stage_ts = ts[-self.tableau.stages :]
        rows = zip(self.tableau.a, self.tableau.b, stage_ts, slopes, strict=True)
        for row, weight, t, slope in rows:
            if weight != 0.0:
                rates = first
                if any(row):
                    y = combine(z, row, slopes[: len(row)], dt)
                    rates = self.at(t, y, slope)[1]
                columns = zip(sums, rates, strict=True)
                sums = tuple(combine(total, (weight,), (rate,), lengths) for total, rate in columns)
        return sums


class Rate:
    """The user's `q(t, z, dz)` as `at` of a `Quadrature`.

    Raises:
        ShapeError: the rates change their shapes.
    """

    def __init__(self, rate: Callable[[Tensor, Any, Any], Any], field: Field) -> None:
        self.rate = rate
        self.field = field
        self.spec: pytree.TreeSpec | None = None

    def __call__(self, t: Tensor, z: Tensor, dz: Tensor | None) -> tuple[Tensor, Rates]:
        if dz is None:
            dz = self.field(t, z)
        layout = self.field.layout
        leaves, spec = pytree.tree_flatten(self.rate(t, layout.split(z), layout.split(dz)))
        if self.spec is None:
            if not all(isinstance(leaf, Tensor) for leaf in leaves):
                got = [type(leaf).__name__ for leaf in leaves]
                raise ShapeError(f"`quadrature` must return a pytree of tensors, got {got}")
            self.spec = spec
        elif spec != self.spec:
            raise ShapeError(f"`quadrature` returned {spec}, and {self.spec} before")
        return dz, tuple(leaves)
