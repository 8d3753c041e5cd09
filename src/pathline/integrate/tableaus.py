"""Runge-Kutta methods as data: Butcher tableaus, and pairs of them for split velocities.

Every constant names its source. The coefficients are checked against the order conditions of
rooted trees in `tests/test_tableaus.py`; a new method needs a line there that states its orders.
"""

import math
from dataclasses import dataclass, field

from ..errors import ArgumentError

_TOLERANCE = 1e-12  # the rationals of the additive methods are published to about 1e-15


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: stage i has the slope k_i = v(t + c_i dt, z + dt sum_j a_ij k_j).

    The step is z(t + dt) ~ z + dt sum_i b_i k_i. The shape of `a` says how stages are found: one
    after the other, each by an equation of its own, or all at once.

    Args:
        name: what users write for `method`.
        order: the power of dt in the global error.
        a: row i holds i entries (explicit), i + 1 (diagonally implicit) or len(b) (fully
            implicit).
        b: weights of the step; they sum to 1.
        c: places of the stages in the step; c_i is the sum of row i.
        b_err: `b` minus the weights of an embedded method: dt sum_i b_err_i k_i estimates the
            error of a step. Without it the method takes fixed steps only.
        b_mid: z(t + dt/2) ~ z + dt sum_i b_mid_i k_i with an error of dt^5 or less, for dense
            output by the quartic through both ends, both slopes and this middle. Without it the
            cubic Hermite interpolant is the better one.

    `explicit` says whether each stage follows from earlier ones by evaluation alone. `fsal` says
    whether the last slope is v(t + dt, z(t + dt)), so that the next step may start with it; an
    implicit method with this property is called stiffly accurate, and the slope serves the next
    step only if its first stage is explicit (`c[0]` and `a[0]` are zero).

    Raises:
        ArgumentError: rows do not fit together, or sums are not what they must be.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, section II.1.

    Example:
        >>> heun = Tableau("heun", order=2, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))
        >>> heun.explicit, heun.stages
        (True, 2)
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    b_err: tuple[float, ...] | None = None
    b_mid: tuple[float, ...] | None = None
    explicit: bool = field(init=False, repr=False, compare=False)
    fsal: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        explicit = all(len(row) == i for i, row in enumerate(self.a))
        object.__setattr__(self, "explicit", explicit)
        columns = [self.a, self.c, *(w for w in (self.b_err, self.b_mid) if w is not None)]
        if not self.b or any(len(column) != self.stages for column in columns):
            raise ArgumentError(
                f"the tableau {self.name!r} must have as many rows in `a` and entries in `c`, "
                f"`b_err` and `b_mid` as weights in `b`, that is {self.stages} and at least 1"
            )
        full = all(len(row) == self.stages for row in self.a)
        if not (self.explicit or self.diagonal or full):
            raise ArgumentError(
                f"the rows `a` of the tableau {self.name!r} have {[len(row) for row in self.a]} "
                "entries. Row i must have i (explicit), i + 1 (diagonally implicit) or, in every "
                "row, as many as `b` (fully implicit)"
            )
        for what, weight, want in (
            *((f"a[{i}]", row, c) for i, (row, c) in enumerate(zip(self.a, self.c, strict=True))),
            ("b", self.b, 1.0),
            ("b_err", (0.0,) if self.b_err is None else self.b_err, 0.0),
            ("b_mid", (0.5,) if self.b_mid is None else self.b_mid, 0.5),
        ):
            if not abs(math.fsum(weight) - want) <= _TOLERANCE:  # `not <=` also refuses nan
                raise ArgumentError(
                    f"`{what}` of the tableau {self.name!r} must sum to {want}, "
                    f"got {math.fsum(weight)}"
                )
        padding = (0.0,) * (self.stages - len(self.a[-1]))
        object.__setattr__(self, "fsal", self.a[-1] + padding == self.b and self.c[-1] == 1)

    @property
    def stages(self) -> int:
        """The number of slopes in a step."""
        return len(self.b)

    @property
    def diagonal(self) -> bool:
        """Whether each stage solves an equation for itself only (explicit methods don't)."""
        return all(len(row) == i + 1 for i, row in enumerate(self.a))


@dataclass(frozen=True)
class ImexTableau:
    """Two tableaus for v = v_explicit + v_implicit, with common stages: an additive method.

    Stage i is z + dt sum_j (a_ij of `explicit` times k_j, plus a_ij of `implicit` times l_j),
    where k_j and l_j are the slopes of the two parts at stage j.

    Args:
        name: what users write for `method`.
        order: the power of dt in the global error of the split problem; never above that of
            either half.
        explicit: the tableau of the part that is evaluated.
        implicit: the tableau of the part that is solved for, diagonally implicit.

    Raises:
        ArgumentError: a half is of the wrong kind or has a lower order, or the halves differ
            in `c`.

    Source: Kennedy, Carpenter, Additive Runge-Kutta schemes for convection-diffusion-reaction
    equations, Applied Numerical Mathematics 44, 2003, section 2.
    """

    name: str
    order: int
    explicit: Tableau
    implicit: Tableau

    def __post_init__(self) -> None:
        if not (self.explicit.explicit and self.implicit.diagonal):
            raise ArgumentError(
                f"the pair {self.name!r} needs an explicit and a diagonally implicit tableau"
            )
        cs = self.explicit.c, self.implicit.c
        if len(cs[0]) != len(cs[1]) or not all(
            abs(x - y) <= _TOLERANCE for x, y in zip(*cs, strict=True)
        ):
            raise ArgumentError(f"the halves of the pair {self.name!r} must have the same `c`")
        if self.order > min(self.explicit.order, self.implicit.order):
            raise ArgumentError(f"the pair {self.name!r} can't have a higher order than its halves")


def _minus(b: tuple[float, ...], embedded: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x - y for x, y in zip(b, embedded, strict=True))


def _middle(*polynomials: tuple[float, ...]) -> tuple[float, ...]:
    """The weights sum_k p_ik theta^k, k = 1, 2, ..., of an interpolant at theta = 1/2."""
    return tuple(math.fsum(x / 2**k for k, x in enumerate(p, start=1)) for p in polynomials)


# Explicit methods with fixed steps. Hairer, Norsett, Wanner I, section II.1; the two of order four
# are those of Kutta, 1901 (table 1.2), HEUN3 is that of Heun, 1900 (table 1.1).

EULER = Tableau("euler", order=1, a=((),), b=(1.0,), c=(0.0,))

MIDPOINT = Tableau("midpoint", order=2, a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5))

HEUN2 = Tableau("heun2", order=2, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))

HEUN3 = Tableau(
    "heun3",
    order=3,
    a=((), (1 / 3,), (0.0, 2 / 3)),
    b=(1 / 4, 0.0, 3 / 4),
    c=(0.0, 1 / 3, 2 / 3),
)

RK4 = Tableau(
    "rk4",
    order=4,
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 0.5, 0.5, 1.0),
)

RK4_38 = Tableau(
    "rk4_38",
    order=4,
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
)


# Explicit methods with adaptive steps. The first three have no b_mid: their steps are off by dt^3
# or dt^4, so a better middle would not make the quartic better than the cubic.

# The step of Heun, 1900, with that of Euler embedded: Hairer, Norsett, Wanner I, section II.4.
ADAPTIVE_HEUN = Tableau(
    "adaptive_heun",
    order=2,
    a=((), (1.0,)),
    b=(0.5, 0.5),
    c=(0.0, 1.0),
    b_err=(-0.5, 0.5),
)

# RKF1(2), stepping with the second order: Fehlberg, Low-order classical Runge-Kutta formulas with
# stepsize control, NASA Technical Report R-315, 1969.
FEHLBERG2 = Tableau(
    "fehlberg2",
    order=2,
    a=((), (1 / 2,), (1 / 256, 255 / 256)),
    b=(1 / 512, 255 / 256, 1 / 512),
    c=(0.0, 1 / 2, 1.0),
    b_err=(-1 / 512, 0.0, 1 / 512),
)

# Bogacki, Shampine, A 3(2) pair of Runge-Kutta formulas, Applied Mathematics Letters 2, 1989.
BOSH3 = Tableau(
    "bosh3",
    order=3,
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    b_err=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)

# Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying
# assumption, Computers and Mathematics with Applications 62, 2011; b_mid is its interpolant.
TSIT5 = Tableau(
    "tsit5",
    order=5,
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    b=(
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
        0.0,
    ),
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    b_err=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    b_mid=_middle(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
)

# Dormand, Prince, A family of embedded Runge-Kutta formulae, Journal of Computational and Applied
# Mathematics 6, 1980. b_err and b_mid: Shampine, Some practical Runge-Kutta formulas, Mathematics
# of Computation 46, 1986.
DOPRI5 = Tableau(
    "dopri5",
    order=5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    b_err=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    b_mid=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

# Prince, Dormand, High order embedded Runge-Kutta formulae, Journal of Computational and Applied
# Mathematics 7, 1981, the pair RK8(7)13M; a fourteenth stage at the end of the step serves the
# interpolant of degree six that torchdiffeq 0.2 evaluates for its dopri8.
_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
    0.0,
)
DOPRI8 = Tableau(
    "dopri8",
    order=8,
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
        _DOPRI8_B[:-1],
    ),
    b=_DOPRI8_B,
    c=(
        0.0,
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
        1.0,
    ),
    b_err=_minus(
        _DOPRI8_B,
        (
            13451932 / 455176623,
            0.0,
            0.0,
            0.0,
            0.0,
            -808719846 / 976000145,
            1757004468 / 5645159321,
            656045339 / 265891186,
            -3867574721 / 1518517206,
            465885868 / 322736535,
            53011238 / 667516719,
            2 / 45,
            0.0,
            0.0,
        ),
    ),
    b_mid=_middle(
        (
            1.0,
            -6.6910181737837595697,
            19.9990069333683970610,
            -30.0610568289666450593,
            22.1396504998094068976,
            -6.3448349392860401388,
        ),
        (),
        (),
        (),
        (),
        (
            0.0,
            -7.6142658045872677172,
            52.2273532792945524050,
            -121.4999627731334642623,
            116.4422149550342161651,
            -39.6107919852202505218,
        ),
        (
            0.0,
            10.7281392630428866124,
            -46.8919164181093621583,
            83.1721004639847717481,
            -67.1451318825957197185,
            20.3761213808791436958,
        ),
        (
            0.0,
            0.5526637063753648783,
            -0.1890893225010595467,
            9.5724507555993664382,
            -16.5672243527496524646,
            7.3347098826795362023,
        ),
        (
            0.0,
            4.2186562625665153803,
            -35.7075975946222072821,
            87.8406057677205645007,
            -89.9916014847245016028,
            32.8801774352459155182,
        ),
        (
            0.0,
            -0.6627209125361597559,
            6.2736448083240352160,
            -17.4152107770762969005,
            22.6237489648532849093,
            -10.1588990526426760954,
        ),
        (
            0.0,
            -1.2636789001135462218,
            10.3160881272450748458,
            -28.5903289514790976966,
            32.2362340167355370113,
            -12.5401268098782561200,
        ),
        (
            0.0,
            5.4106037898590422230,
            -34.7650769866611817349,
            81.6630950584341412934,
            -82.1020315488359848644,
            29.5553001484516038033,
        ),
        (
            0.0,
            -7.0321379067945741781,
            47.7457971078225540396,
            -114.9375291377009418170,
            116.2662185791119533462,
            -41.7923486424390588923,
        ),
        (
            0.0,
            2.3537586759714983486,
            -19.0082099341608028453,
            50.2558364226176017553,
            -53.9020777466385396792,
            20.3006925822100825485,
        ),
    ),
)


# Implicit methods with fixed steps: Hairer, Wanner, Solving Ordinary Differential Equations II,
# 1996, sections IV.5 (Gauss, Radau) and IV.6 (diagonally implicit).

IMPLICIT_EULER = Tableau("implicit_euler", order=1, a=((1.0,),), b=(1.0,), c=(1.0,))

IMPLICIT_MIDPOINT = Tableau("implicit_midpoint", order=2, a=((0.5,),), b=(1.0,), c=(0.5,))

TRAPEZOID = Tableau("trapezoid", order=2, a=((0.0,), (0.5, 0.5)), b=(0.5, 0.5), c=(0.0, 1.0))

# Table IV.5.5.
RADAU_IIA3 = Tableau(
    "radauIIA3",
    order=3,
    a=((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
    b=(3 / 4, 1 / 4),
    c=(1 / 3, 1.0),
)

# Table IV.5.6.
_ROOT6 = math.sqrt(6)
RADAU_IIA5 = Tableau(
    "radauIIA5",
    order=5,
    a=(
        ((88 - 7 * _ROOT6) / 360, (296 - 169 * _ROOT6) / 1800, (-2 + 3 * _ROOT6) / 225),
        ((296 + 169 * _ROOT6) / 1800, (88 + 7 * _ROOT6) / 360, (-2 - 3 * _ROOT6) / 225),
        ((16 - _ROOT6) / 36, (16 + _ROOT6) / 36, 1 / 9),
    ),
    b=((16 - _ROOT6) / 36, (16 + _ROOT6) / 36, 1 / 9),
    c=((4 - _ROOT6) / 10, (4 + _ROOT6) / 10, 1.0),
)

# Table IV.5.1, the method of Hammer and Hollingsworth.
_ROOT3 = math.sqrt(3)
GL4 = Tableau(
    "gl4",
    order=4,
    a=((1 / 4, 1 / 4 - _ROOT3 / 6), (1 / 4 + _ROOT3 / 6, 1 / 4)),
    b=(1 / 2, 1 / 2),
    c=(1 / 2 - _ROOT3 / 6, 1 / 2 + _ROOT3 / 6),
)

# Table IV.5.2, the method of Kuntzmann and Butcher.
_ROOT15 = math.sqrt(15)
GL6 = Tableau(
    "gl6",
    order=6,
    a=(
        (5 / 36, 2 / 9 - _ROOT15 / 15, 5 / 36 - _ROOT15 / 30),
        (5 / 36 + _ROOT15 / 24, 2 / 9, 5 / 36 - _ROOT15 / 24),
        (5 / 36 + _ROOT15 / 30, 2 / 9 + _ROOT15 / 15, 5 / 36),
    ),
    b=(5 / 18, 4 / 9, 5 / 18),
    c=(1 / 2 - _ROOT15 / 10, 1 / 2, 1 / 2 + _ROOT15 / 10),
)

# Alexander, Diagonally implicit Runge-Kutta methods for stiff O.D.E.'s, SIAM Journal on Numerical
# Analysis 14, 1977; the ARS pair below shares this gamma.
_GAMMA = 1 - 1 / math.sqrt(2)
SDIRK2 = Tableau(
    "sdirk2",
    order=2,
    a=((_GAMMA,), (1 - _GAMMA, _GAMMA)),
    b=(1 - _GAMMA, _GAMMA),
    c=(_GAMMA, 1.0),
)

# Hosea, Shampine, Analysis and implementation of TR-BDF2, Applied Numerical Mathematics 20, 1996:
# a trapezoid to t + 2 gamma dt, then BDF2 to t + dt.
TRBDF2 = Tableau(
    "trbdf2",
    order=2,
    a=(
        (0.0,),
        (_GAMMA, _GAMMA),
        (math.sqrt(2) / 4, math.sqrt(2) / 4, _GAMMA),
    ),
    b=(math.sqrt(2) / 4, math.sqrt(2) / 4, _GAMMA),
    c=(0.0, 2 * _GAMMA, 1.0),
)


# Additive methods of Kennedy and Carpenter, 2003 (see `ImexTableau`): ARK3(2)4L[2]SA,
# ARK4(3)6L[2]SA and ARK5(4)8L[2]SA. The halves share b, c and the embedded weights, so the error
# of the pair is estimated with the `b_err` of either half, over the sum of the slopes. ESDIRK3, 4
# and 5 serve alone as adaptive methods for stiff velocities.

_ARK3_GAMMA = 1767732205903 / 4055673282236  # the root 0.43586... of x^3 - 3 x^2 + 3/2 x - 1/6
_ARK3_B = (
    1471266399579 / 7840856788654,
    -4482444167858 / 7529755066697,
    11266239266428 / 11593286722821,
    _ARK3_GAMMA,
)
_ARK3_C = (0.0, 2 * _ARK3_GAMMA, 3 / 5, 1.0)
_ARK3_ERR = _minus(
    _ARK3_B,
    (
        2756255671327 / 12835298489170,
        -10771552573575 / 22201958757719,
        9247589265047 / 10645013368117,
        2193209047091 / 5459859503100,
    ),
)
ESDIRK3 = Tableau(
    "kencarp3",
    order=3,
    a=(
        (0.0,),
        (_ARK3_GAMMA, _ARK3_GAMMA),
        (2746238789719 / 10658868560708, -640167445237 / 6845629431997, _ARK3_GAMMA),
        _ARK3_B,
    ),
    b=_ARK3_B,
    c=_ARK3_C,
    b_err=_ARK3_ERR,
)
ARK3_EXPLICIT = Tableau(
    "ark3_explicit",
    order=3,
    a=(
        (),
        (2 * _ARK3_GAMMA,),
        (5535828885825 / 10492691773637, 788022342437 / 10882634858940),
        (
            6485989280629 / 16251701735622,
            -4246266847089 / 9704473918619,
            10755448449292 / 10357097424841,
        ),
    ),
    b=_ARK3_B,
    c=_ARK3_C,
    b_err=_ARK3_ERR,
)

_ARK4_B = (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4)
_ARK4_C = (0.0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1.0)
_ARK4_ERR = _minus(
    _ARK4_B,
    (
        4586570599 / 29645900160,
        0.0,
        178811875 / 945068544,
        814220225 / 1159782912,
        -3700637 / 11593932,
        61727 / 225920,
    ),
)
ESDIRK4 = Tableau(
    "kencarp4",
    order=4,
    a=(
        (0.0,),
        (1 / 4, 1 / 4),
        (8611 / 62500, -1743 / 31250, 1 / 4),
        (5012029 / 34652500, -654441 / 2922500, 174375 / 388108, 1 / 4),
        (
            15267082809 / 155376265600,
            -71443401 / 120774400,
            730878875 / 902184768,
            2285395 / 8070912,
            1 / 4,
        ),
        _ARK4_B,
    ),
    b=_ARK4_B,
    c=_ARK4_C,
    b_err=_ARK4_ERR,
)
ARK4_EXPLICIT = Tableau(
    "ark4_explicit",
    order=4,
    a=(
        (),
        (1 / 2,),
        (13861 / 62500, 6889 / 62500),
        (
            -116923316275 / 2393684061468,
            -2731218467317 / 15368042101831,
            9408046702089 / 11113171139209,
        ),
        (
            -451086348788 / 2902428689909,
            -2682348792572 / 7519795681897,
            12662868775082 / 11960479115383,
            3355817975965 / 11060851509271,
        ),
        (
            647845179188 / 3216320057751,
            73281519250 / 8382639484533,
            552539513391 / 3454668386233,
            3354512671639 / 8306763924573,
            4040 / 17871,
        ),
    ),
    b=_ARK4_B,
    c=_ARK4_C,
    b_err=_ARK4_ERR,
)

_ARK5_B = (
    -872700587467 / 9133579230613,
    0.0,
    0.0,
    22348218063261 / 9555858737531,
    -1143369518992 / 8141816002931,
    -39379526789629 / 19018526304540,
    32727382324388 / 42900044865799,
    41 / 200,
)
_ARK5_C = (
    0.0,
    41 / 100,
    2935347310677 / 11292855782101,
    1426016391358 / 7196633302097,
    92 / 100,
    24 / 100,
    3 / 5,
    1.0,
)
_ARK5_ERR = _minus(
    _ARK5_B,
    (
        -975461918565 / 9796059967033,
        0.0,
        0.0,
        78070527104295 / 32432590147079,
        -548382580838 / 3424219808633,
        -33438840321285 / 15594753105479,
        3629800801594 / 4656183773603,
        4035322873751 / 18575991585200,
    ),
)
ESDIRK5 = Tableau(
    "kencarp5",
    order=5,
    a=(
        (0.0,),
        (41 / 200, 41 / 200),
        (41 / 400, -567603406766 / 11931857230679, 41 / 200),
        (683785636431 / 9252920307686, 0.0, -110385047103 / 1367015193373, 41 / 200),
        (
            3016520224154 / 10081342136671,
            0.0,
            30586259806659 / 12414158314087,
            -22760509404356 / 11113319521817,
            41 / 200,
        ),
        (
            218866479029 / 1489978393911,
            0.0,
            638256894668 / 5436446318841,
            -1179710474555 / 5321154724896,
            -60928119172 / 8023461067671,
            41 / 200,
        ),
        (
            1020004230633 / 5715676835656,
            0.0,
            25762820946817 / 25263940353407,
            -2161375909145 / 9755907335909,
            -211217309593 / 5846859502534,
            -4269925059573 / 7827059040749,
            41 / 200,
        ),
        _ARK5_B,
    ),
    b=_ARK5_B,
    c=_ARK5_C,
    b_err=_ARK5_ERR,
)
ARK5_EXPLICIT = Tableau(
    "ark5_explicit",
    order=5,
    a=(
        (),
        (41 / 100,),
        (367902744464 / 2072280473677, 677623207551 / 8224143866563),
        (1268023523408 / 10340822734521, 0.0, 1029933939417 / 13636558850479),
        (
            14463281900351 / 6315353703477,
            0.0,
            66114435211212 / 5879490589093,
            -54053170152839 / 4284798021562,
        ),
        (
            14090043504691 / 34967701212078,
            0.0,
            15191511035443 / 11219624916014,
            -18461159152457 / 12425892160975,
            -281667163811 / 9011619295870,
        ),
        (
            19230459214898 / 13134317526959,
            0.0,
            21275331358303 / 2942455364971,
            -38145345988419 / 4862620318723,
            -1 / 8,
            -1 / 8,
        ),
        (
            -19977161125411 / 11928030595625,
            0.0,
            -40795976796054 / 6384907823539,
            177454434618887 / 12078138498510,
            782672205425 / 8267701900261,
            -69563011059811 / 9646580694205,
            7356628210526 / 4942186776405,
        ),
    ),
    b=_ARK5_B,
    c=_ARK5_C,
    b_err=_ARK5_ERR,
)

IMEX_ARK3 = ImexTableau("imex_ark3", order=3, explicit=ARK3_EXPLICIT, implicit=ESDIRK3)
IMEX_ARK4 = ImexTableau("imex_ark4", order=4, explicit=ARK4_EXPLICIT, implicit=ESDIRK4)
IMEX_ARK5 = ImexTableau("imex_ark5", order=5, explicit=ARK5_EXPLICIT, implicit=ESDIRK5)


# Additive methods of Ascher, Ruuth, Spiteri, Implicit-explicit Runge-Kutta methods for
# time-dependent partial differential equations, Applied Numerical Mathematics 25, 1997: (1,1,1)
# of section 2.1, (2,2,2) of 2.6 and (4,4,3) of 2.8. The implicit halves are padded with a first
# stage at the start of the step, which none of their equations uses.

IMEX_EULER = ImexTableau(
    "imex_euler",
    order=1,
    explicit=Tableau("imex_euler_explicit", order=1, a=((), (1.0,)), b=(1.0, 0.0), c=(0.0, 1.0)),
    implicit=Tableau(
        "imex_euler_implicit", order=1, a=((0.0,), (0.0, 1.0)), b=(0.0, 1.0), c=(0.0, 1.0)
    ),
)

_DELTA = 1 - 1 / (2 * _GAMMA)
ARS222 = ImexTableau(
    "ars222",
    order=2,
    explicit=Tableau(
        "ars222_explicit",
        order=2,
        a=((), (_GAMMA,), (_DELTA, 1 - _DELTA)),
        b=(_DELTA, 1 - _DELTA, 0.0),
        c=(0.0, _GAMMA, 1.0),
    ),
    implicit=Tableau(
        "ars222_implicit",
        order=2,
        a=((0.0,), (0.0, _GAMMA), (0.0, 1 - _GAMMA, _GAMMA)),
        b=(0.0, 1 - _GAMMA, _GAMMA),
        c=(0.0, _GAMMA, 1.0),
    ),
)

ARS443 = ImexTableau(
    "ars443",
    order=3,
    explicit=Tableau(
        "ars443_explicit",
        order=3,
        a=(
            (),
            (1 / 2,),
            (11 / 18, 1 / 18),
            (5 / 6, -5 / 6, 1 / 2),
            (1 / 4, 7 / 4, 3 / 4, -7 / 4),
        ),
        b=(1 / 4, 7 / 4, 3 / 4, -7 / 4, 0.0),
        c=(0.0, 1 / 2, 2 / 3, 1 / 2, 1.0),
    ),
    implicit=Tableau(
        "ars443_implicit",
        order=3,
        a=(
            (0.0,),
            (0.0, 1 / 2),
            (0.0, 1 / 6, 1 / 2),
            (0.0, -1 / 2, 1 / 2, 1 / 2),
            (0.0, 3 / 2, -3 / 2, 1 / 2, 1 / 2),
        ),
        b=(0.0, 3 / 2, -3 / 2, 1 / 2, 1 / 2),
        c=(0.0, 1 / 2, 2 / 3, 1 / 2, 1.0),
    ),
)
