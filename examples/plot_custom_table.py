"""
A real table: density, samples, unusual rows
============================================

Two weeks of minutes of one household's electricity, which come with the package: six columns with
sharp edges and several modes. A Gaussian of the same mean and covariance is the yardstick.
"""

import os

import numpy as np
import torch

import pathline as pl
from pathline.data import load_electricity

# %%
# `support` keeps the minute of the day, 0 to 1439, inside the day: no sample lies outside.
table = load_electricity()
print(table.columns, table.train.shape, table.source, sep="\n")
bounds = [(-0.5, 1439.5) if n == "minute_of_day" else (None, None) for n in table.columns]

flow = pl.flows.OTFlow(dim=6, support=bounds)
steps = 60 if os.environ.get("SMOKE") else 600
pl.fit(flow, table.train, validation=table.validation, max_steps=steps, progress=False)

# %%
# Held-out negative log-likelihoods in nats, and the least likely minute of the test rows.
train, test = torch.from_numpy(table.train), torch.from_numpy(table.test)
with torch.no_grad():
    log_p = flow.log_prob(test)
gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.mT.cov())
nll, gaussian_nll = -log_p.mean().item(), -gaussian.log_prob(test).mean().item()
print(f"flow {nll:.2f}, Gaussian {gaussian_nll:.2f}")
print("least likely:", dict(zip(table.columns, test[log_p.argmin()].tolist(), strict=True)))

# %%
# Samples in the units of the table: power over the day.
samples = flow.sample(2_000, seed=0).numpy()
if __name__ == "__main__":
    import matplotlib.pyplot as plt

    minute, power = (table.columns.index(n) for n in ("minute_of_day", "global_active_power"))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, name, rows in zip(axes, ("data", "samples"), (table.test, samples), strict=True):
        ax.plot(rows[:, minute] / 60, np.asarray(rows[:, power]), ".", ms=2)
        ax.set(title=name, xlabel="hour", xlim=(0, 24))
    axes[0].set_ylabel("active power, kW")
    plt.show()
