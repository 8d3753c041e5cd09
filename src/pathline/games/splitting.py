"""The two halves of a proximal splitting of dynamic transport in two dimensions.

Source: Papadakis, Peyre, Oudet, Optimal transport with proximal splitting (arXiv 1304.5784).
"""

import numpy as np
from scipy.fft import dct, dctn, dst, idctn
from scipy.special import wrightomega

from .staggered import AXES, Array, gradient, mean, to_faces, to_nodes

Copies = list[Array]  # rho at x faces, at y faces, at the nodes 1..N; m at x faces, at y faces


class Continuity:
    """The projection of copies onto d_t rho + div m = 0 on [0, 1] with rho(0) = rho_0.

    Minimises the squared distance, in which densities weigh `speed2` and momenta 1. In time the
    densities minus rho_0 are sines (zero at the start, flat at the end, where a node weighs half)
    and phi cosines; in space both are cosines. In these modes means and differences are numbers.
    """

    def __init__(
        self, rho_0: Array, spacing: tuple[float, float], steps: int, speed2: float
    ) -> None:
        self.rho_0, self.spacing, self.speed2 = rho_0, spacing, speed2
        nx, ny = rho_0.shape
        t = np.pi * (np.arange(steps) + 0.5)[:, None, None] / (2 * steps)
        x, y = np.pi * np.arange(nx)[:, None] / (2 * nx), np.pi * np.arange(ny) / (2 * ny)
        self.d_t = 2 * np.sin(t) * steps
        self.H = speed2 * (np.cos(t) ** 2 * (np.cos(x) ** 2 + np.cos(y) ** 2) + 1)
        laplace = (2 * np.sin(x) / spacing[0]) ** 2 + (2 * np.sin(y) / spacing[1]) ** 2
        self.schur = self.d_t**2 / self.H + laplace

    def __call__(self, Z: Copies) -> tuple[Copies, Array]:
        """The nearest copies, and the multiplier phi of the equation."""
        rest = self.rho_0[None]
        x, y = (mean(z - to_faces(rest, a), a) for z, a in zip(Z[:2], AXES, strict=True))
        source = _cosines(dst(to_nodes(x + y) + Z[2] - rest, 3, axis=0)) * self.speed2
        div = sum(np.diff(m, axis=a) / h for m, a, h in zip(Z[3:], AXES, self.spacing, strict=True))
        phi = (self.d_t * source / self.H + _cosines(dct(div, 4, axis=0))) / self.schur
        rho = rest + _from_cosines(dst((source - self.d_t * phi) / self.H, 2, axis=0))
        phi = _from_cosines(dct(phi, 4, axis=0))
        middle = mean(np.concatenate([rest, rho]), -3)
        m = [z + gradient(phi, a, h) for z, a, h in zip(Z[3:], AXES, self.spacing, strict=True)]
        return [*(to_faces(middle, a) for a in AXES), rho, *m], phi


def face_minimum(rho: Array, m: Array, ratio: float, speed2: float) -> tuple[Array, Array]:
    """argmin over r >= 0 and n of ratio n^2 / (2 r) + speed2 (r - rho)^2 / 2 + (n - m)^2 / 2.

    n = m r / (r + ratio) leaves the cubic (r - rho) (r + ratio)^2 = c, convex where r > rho:
    Newton's method comes down from a bound of its root.
    """
    c = ratio * m**2 / (2 * speed2)
    r = np.maximum(rho, 0)
    r = r + np.minimum(np.cbrt(c), c / (r + ratio) ** 2)
    for _ in range(50):
        step = ((r - rho) * (r + ratio) - c / (r + ratio)) / (3 * r + ratio - 2 * rho)
        new = np.maximum(r - step, 0)
        done = np.abs(new - r).max() <= 1e-14 * new.max()
        r = new
        if done:
            break
    return r, m * r / (r + ratio)


def node_minimum(rho: Array, alpha: Array, beta: Array, penalty: float) -> Array:
    """argmin over r > 0 of alpha r log r + beta r + penalty (r - rho)^2 / 2, for alpha > 0.

    With scale = alpha / penalty, r / scale + log(r / scale) is known.
    """
    scale = alpha / penalty
    return scale * wrightomega(rho / scale - beta / alpha - 1 - np.log(scale))


def _cosines(values: Array) -> Array:
    """Coefficients in space, and the scale of `dct` and `dst` of type 3 and 4 in time."""
    return dctn(values, 2, axes=AXES, norm="ortho") / len(values)


def _from_cosines(coefficients: Array) -> Array:
    return idctn(coefficients, 2, axes=AXES, norm="ortho") / 2
