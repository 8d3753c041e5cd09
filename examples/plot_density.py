"""
A density in the plane, beside the truth
========================================

The two moons have a known density, so the flow's error can be measured: the mean of
log p(x) - log q(x) over fresh points is the Kullback-Leibler divergence, in nats.
"""

import os

import torch

import pathline as pl
from pathline.data import TOYS

# %%
# Train on points, and compare log-densities on others.
moons = TOYS["moons"]
points = moons.sample(10_000, torch.Generator().manual_seed(0))
fresh = moons.sample(5_000, torch.Generator().manual_seed(1))

flow = pl.flows.OTFlow(dim=2)
run = pl.fit(flow, points, max_steps=100 if os.environ.get("SMOKE") else None, progress=False)
with torch.no_grad():
    nll = -flow.log_prob(fresh).mean().item()
divergence = nll + moons.log_prob(fresh).mean().item()
check = flow.check(fresh)
print(f"{run.steps} steps, divergence {divergence:.3f} nats\n{check.verdict}")

# %%
# Both densities on a grid.
if __name__ == "__main__":
    import matplotlib.pyplot as plt

    x, y = torch.linspace(-4, 4, 200).double(), torch.linspace(-3, 3, 150).double()
    grid = torch.cartesian_prod(x, y)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    with torch.no_grad():
        panels = {"truth": moons.log_prob(grid), "flow": flow.log_prob(grid)}
    for ax, (name, log_p) in zip(axes, panels.items(), strict=True):
        ax.pcolormesh(x, y, log_p.exp().reshape(200, 150).T, vmin=0, vmax=0.3, cmap="Blues")
        ax.set(title=name, aspect="equal")
    plt.show()
