"""Explicit Runge-Kutta methods as data. Adding one: a constant here and its name in `METHODS`."""

from dataclasses import dataclass

from ..errors import ArgumentError


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau of an explicit method: stage i is evaluated at time t + c[i] dt.

    Raises:
        ArgumentError: rows are not strictly lower triangular, do not sum to c, or b does not
            sum to one.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        square = len(self.a) == len(self.b) == len(self.c)
        triangular = all(len(row) == i for i, row in enumerate(self.a))
        sums = [sum(row) - c for row, c in zip(self.a, self.c, strict=False)] + [sum(self.b) - 1]
        if not (square and triangular and max(map(abs, sums)) < 1e-12):
            raise ArgumentError(f"the tableau {self.name!r} is not a consistent explicit method")


EULER = Tableau("euler", order=1, a=((),), b=(1.0,), c=(0.0,))
MIDPOINT = Tableau("midpoint", order=2, a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5))
RK4 = Tableau(
    "rk4",
    order=4,
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 0.5, 0.5, 1.0),
)

METHODS = {tableau.name: tableau for tableau in (EULER, MIDPOINT, RK4)}
