"""The solves of `solvers.py` in diffrax, one at a time on request; needs jax, diffrax, equinox.

Started by `solvers.py --jax-python PATH`. Reads a problem per line, as JSON, and answers its name
with the CPU seconds of one call; functions are compiled on their first call.
"""

import json
import os
import sys
import time
from itertools import pairwise
from typing import ClassVar

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import diffrax
import jax
import jax.numpy as jnp
import numpy as np


class RK4(diffrax.AbstractERK):
    """The classical method, which diffrax does not bring."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


def velocity(t, y, weights):
    for W, b in weights[:-1]:
        y = jnp.tanh(y @ W + b)
    W, b = weights[-1]
    return y @ W + b


def functions(problem):
    """The solve and its gradient, jitted, and their arguments."""
    draw = np.random.default_rng(0)
    sizes = problem["sizes"]
    weights = []
    for a, b in pairwise(sizes):
        scale = a**-0.5
        pair = draw.uniform(-scale, scale, (a, b)), draw.uniform(-scale, scale, b)
        weights.append(tuple(jnp.asarray(x, jnp.float32) for x in pair))
    y0 = jnp.asarray(draw.standard_normal((problem["rows"], sizes[0])), jnp.float32)
    if problem["method"] == "rk4":
        solver, steps = RK4(), {"dt0": 1 / problem["steps"], "max_steps": problem["steps"]}
    else:
        control = diffrax.PIDController(rtol=1e-5, atol=1e-5)
        solver, steps = diffrax.Dopri5(), {"dt0": None, "stepsize_controller": control}
    adjoint = getattr(diffrax, problem["adjoint"])()

    def solve(y0, weights):
        term = diffrax.ODETerm(velocity)
        return diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, y0=y0, args=weights, adjoint=adjoint, **steps
        ).ys[-1]

    def loss(y0, weights):
        return (solve(y0, weights) ** 2).mean()

    return {"forward": jax.jit(solve), "both": jax.jit(jax.grad(loss, (0, 1)))}, (y0, weights)


def main():
    known = {}
    for line in sys.stdin:
        problem = json.loads(line)
        what = problem.pop("what")
        key = json.dumps(problem)
        if key not in known:
            known[key] = functions(problem)
        jitted, arguments = known[key]
        start = time.process_time()
        jax.block_until_ready(jitted[what](*arguments))
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    print(json.dumps({"jax": jax.__version__, "diffrax": diffrax.__version__}), flush=True)
    main()
