"""
A crowd passes a pillar
=======================

A population moves from one place to another, and everyone pays for walking, for being near a
pillar, and for ending elsewhere. At the equilibrium nobody can do better alone. The pillar stands a
little to the right of the way, so the crowd goes round on the left. Its density is known exactly at
every time, because the flow that carries it is.
"""

import os

import torch
from torch.distributions import Independent, Normal

import pathline as pl
from pathline.control import Weights

DEVIATION = 0.5


def ball(height):
    """A Gaussian around (0, height)."""
    return Independent(Normal(torch.tensor([0.0, height]), DEVIATION * torch.ones(2)), 1)


def pillar(z):
    return 60 * torch.exp(-(z - torch.tensor([0.5, 0.0])).square().sum(1))


# %%
# Straight through the pillar costs 18 for walking 6 in time 1, and the pillar on the way.
game = pl.games.MeanFieldGame(ball(3.0), ball(-3.0), preference=pillar, entropy=0.01)
crowd = pl.control.solve(
    game,
    weights=Weights(hjb=5.0, terminal=1.0, terminal_gradient=0.0),
    steps=6,
    width=24,
    max_steps=150 if os.environ.get("SMOKE") else 500,
    learning_rate=0.05,
    progress=False,
)
x = game.initial(2000, torch.Generator().manual_seed(1))
cost = crowd.cost(x)
t = torch.linspace(0, 1, 201)
straight = torch.stack([pillar(x - torch.tensor([0.0, 6.0]) * s).mean() for s in t])
straight_cost = 18 + torch.trapezoid(straight, t).item()
print({name: round(value, 3) for name, value in cost.items()})
print(f"straight through: {straight_cost:.3f}\n{crowd.check().verdict}")

# %%
# The density on a grid, by following its points back to where they started.
if __name__ == "__main__":
    import matplotlib.pyplot as plt

    a, b = torch.linspace(-3, 3, 120), torch.linspace(-5, 5, 200)
    grid = torch.cartesian_prod(a, b)
    figure, axes = plt.subplots(1, 5, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, time in zip(axes, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        rho = game.source.log_prob(grid).exp() if time == 0 else crowd.density(grid, time)
        ax.pcolormesh(a, b, rho.reshape(120, 200).T, cmap="Blues")
        ax.contour(a, b, pillar(grid).reshape(120, 200).T, 3, colors="grey", linewidths=0.6)
        ax.set(title=f"time {time:g}", aspect="equal")
    plt.show()

# %%
# Some of the particles in motion.
if __name__ == "__main__":
    from matplotlib.animation import FuncAnimation

    ways = crowd.crowd(x[:400], steps=32).states
    figure, ax = plt.subplots(figsize=(3.2, 4.6), layout="constrained")
    ax.contour(a, b, pillar(grid).reshape(120, 200).T, 3, colors="grey", linewidths=0.6)
    ax.set(aspect="equal", xlim=(-3, 3), ylim=(-5, 5))
    dots = ax.scatter(*ways[0].T, s=4)

    def show(n):
        dots.set_offsets(ways[n])
        return (dots,)

    motion = FuncAnimation(figure, show, frames=len(ways), interval=60)
    plt.show()
