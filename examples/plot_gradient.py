"""
An exact gradient, and one of a rebuilt solution
================================================

The continuous adjoint needs the state on its way back. It discards the one that was computed, and
solves the equation backwards from the last state. Where solutions decay, that is unstable: what
shrinks forwards grows backwards, errors included. The gradient of the steps themselves is exact.

Here u' = theta u with theta = -50, and u' = -max(0, theta u) with theta = 10, both from u(0) = 1 to
time 1. The loss is the integral of u, whose derivatives are known.
"""

import math
import os

import torch

import pathline as pl

STEPS = (
    (20, 50, 100)
    if os.environ.get("SMOKE")
    else (20, 25, 32, 40, 50, 64, 80, 100, 130, 160, 200, 250, 320, 400)
)


def decay(theta, u):
    return theta * u


def relu(theta, u):
    return -torch.relu(theta * u)


def exact(theta):
    """dL/du0 and dL/dtheta of L, the integral of exp(theta t) for t from 0 to 1."""
    return math.expm1(theta) / theta, (math.exp(theta) * (theta - 1) + 1) / theta**2


# %%
# The state holds u and its integral so far. `steps` is the number of steps of rk4, or None for
# dopri5 at its default tolerances.
def end(velocity, theta, u0, steps, times=(0.0, 1.0), **options):
    """(u, integral of u) at the last time."""
    start = u0 if u0.ndim else torch.stack([u0, torch.zeros_like(u0)])
    if steps is None:
        options |= {"method": "dopri5"}
    else:
        options |= {"method": "rk4", "options": {"step_size": 1 / steps}}

    def both(t, state):
        return torch.stack([velocity(theta, state[0]), state[0]])

    return pl.odeint(both, start, list(times), **options)[-1]


def gradients(velocity, theta, steps, gradient, dtype=torch.float32):
    """dL/du0 and dL/dtheta by one of the strategies."""
    leaves = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (1.0, theta)]
    loss = end(velocity, leaves[1], leaves[0], steps, gradient=gradient)[1]
    return [grad.item() for grad in torch.autograd.grad(loss, leaves)]


def differences(velocity, theta, steps, h=1e-5):
    """dL/du0 and dL/dtheta of the same steps by central differences, in double precision."""

    def loss(u0, theta):
        u0, theta = (torch.tensor(x, dtype=torch.float64) for x in (u0, theta))
        return end(velocity, theta, u0, steps)[1].item()

    by_start = loss(1 + h, theta) - loss(1 - h, theta)
    by_theta = loss(1.0, theta + h) - loss(1.0, theta - h)
    return [by_start / (2 * h), by_theta / (2 * h)]


def rebuilt(velocity, theta, steps, dtype=torch.float32):
    """u(0), solved backwards from u(1)."""
    u0, theta = torch.tensor(1.0, dtype=dtype), torch.tensor(theta, dtype=dtype)
    return end(velocity, theta, end(velocity, theta, u0, steps), steps, (1.0, 0.0))[0].item()


# %%
# In float32, all of it: u(0) rebuilt from u(1), where 1 is right, and both derivatives of the loss.
CASES = {
    ("u' = -50 u", decay, -50.0): (25, 50, 100, 400, None),
    ("u' = -max(0, 10 u)", relu, 10.0): (4, 8, 20, 100, None),
}
rows = []
for (name, velocity, theta), counts in CASES.items():
    for steps in counts:
        discrete = gradients(velocity, theta, steps, "discrete")
        adjoint = gradients(velocity, theta, steps, "adjoint")
        u0 = rebuilt(velocity, theta, steps)
        rows.append((name, steps, u0, *discrete, *adjoint))
        solver = "dopri5" if steps is None else f"rk4, {steps} steps"
        print(f"{name:19} {solver:15} u(0) {u0:9.3g}", end="   ")
        print("discrete {:9.3g} {:10.3g}   adjoint {:9.3g} {:10.3g}".format(*discrete, *adjoint))
    start, slope = exact(-abs(theta))
    print(f"analytic: {start:.3g} and {math.copysign(slope, -theta):.3g}")

# %%
# The discrete gradient is the derivative of what is computed, however coarse the steps: in double
# precision it agrees with central differences. The adjoint errs there as much as in float32.
checks = {}
for name, velocity, theta, steps in (
    ("decay", decay, -50.0, 25),
    ("decay, dopri5", decay, -50.0, None),
    ("relu", relu, 10.0, 4),
    ("relu, 20", relu, 10.0, 20),
):
    true = differences(velocity, theta, steps)
    errors = []
    for gradient in ("discrete", "adjoint"):
        found = gradients(velocity, theta, steps, gradient, torch.float64)
        errors.append([abs(g / d - 1) for g, d in zip(found, true, strict=True)])
    checks[name] = {"discrete": max(errors[0]), "adjoint": max(errors[1])}
    print(f"{name:14} relative error: discrete {max(errors[0]):.1e}, adjoint {max(errors[1]):.1e}")

# %%
# Left: u on its way there and back. Right: the error of dL/dtheta over the number of steps.
if __name__ == "__main__":
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    one, theta = torch.tensor([1.0]), torch.tensor(-50.0)
    for steps, colour in ((25, "C3"), (50, "C1"), (100, "C0")):
        ts = torch.linspace(0, 1, steps + 1)
        there = pl.odeint(lambda t, u: decay(theta, u), one, ts, method="rk4")
        back = pl.odeint(lambda t, u: decay(theta, u), there[-1], ts.flip(0), method="rk4")
        left.semilogy(ts, there, color=colour, label=f"{steps} steps")
        left.semilogy(ts.flip(0), back, color=colour, linestyle="--")
    left.plot([], [], "k--", label="back")
    left.set(title="u' = -50 u, there and back", xlabel="t", ylabel="u")
    left.legend()
    for (name, velocity, theta), colour in zip(CASES, ("C0", "C2"), strict=True):
        errors = {"discrete": [], "adjoint": []}
        for steps in STEPS:
            true = gradients(velocity, theta, steps, "discrete", torch.float64)[1]
            for gradient, values in errors.items():
                found = gradients(velocity, theta, steps, gradient)[1]
                values.append(abs(found / true - 1) + 1e-9)
        right.loglog(STEPS, errors["adjoint"], colour, label=f"adjoint, {name}")
        right.loglog(STEPS, errors["discrete"], colour + ":", label=f"discrete, {name}")
    right.set(title="relative error of dL/dtheta, float32", xlabel="steps of rk4")
    right.set_xticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
    right.minorticks_off()
    right.legend(fontsize="small")
    plt.show()
