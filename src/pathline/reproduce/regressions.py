"""Conditional Gaussians to compare with: a linear regression, and a network."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ..train import Loss, Objective, fit

Pairs = tuple[np.ndarray, np.ndarray]  # x (rows, dim) and context (rows, context_dim)

HIDDEN = 64
PATIENCE = 25  # validations of about fifty


class LinearGaussian:
    """x given y as N(A y + b, S), fitted by least squares to pairs."""

    def __init__(self, pairs: Pairs) -> None:
        x, y = pairs
        self.weights = np.linalg.lstsq(_with_one(y), x, rcond=None)[0]
        residuals = x - _with_one(y) @ self.weights
        self.root = np.linalg.cholesky(residuals.T @ residuals / len(x))

    def nll(self, pairs: Pairs) -> float:
        """Mean negative log-likelihood of pairs, in nats."""
        x, y = pairs
        z = np.linalg.solve(self.root, (x - _with_one(y) @ self.weights).T)  # (dim, rows)
        log_det = np.log(self.root.diagonal()).sum()
        return float(0.5 * np.square(z).sum(0).mean() + log_det + 0.5 * len(z) * np.log(2 * np.pi))


def _with_one(y: np.ndarray) -> np.ndarray:
    return np.column_stack([y, np.ones(len(y))])


class GaussianNetwork(Objective):
    """x given y as N(m(y), R(y)^-1 R(y)^-T), by one network for m and the triangular R.

    Both are standardised data. R has e^r on its diagonal, so that any covariance is possible.
    """

    def __init__(self, dim: int, context_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dim = dim
        self.below = torch.tril_indices(dim, dim, -1)
        outputs = 2 * dim + self.below.shape[1]
        sizes = (context_dim, HIDDEN, HIDDEN, outputs)
        layers: list[nn.Module] = []
        for inputs, columns in pairwise(sizes):
            layer = nn.Linear(inputs, columns)
            nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Tanh()]  # which stays bounded at an outlying context
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        nll = self._nll(batch)
        mean = nll.mean() if weights is None else (nll * weights.to(nll)).mean()
        return Loss(mean, {"nll": mean.detach()})

    @torch.no_grad()
    def validate(self, batch: Tensor) -> Tensor:
        return self._nll(batch)

    def _nll(self, batch: Tensor) -> Tensor:
        """Of each row (x, y), in nats, (rows,)."""
        x, y = batch.float().split([self.dim, batch.shape[1] - self.dim], 1)
        mean, log_diagonal, below = self.model(y).split(
            [self.dim, self.dim, self.below.shape[1]], 1
        )
        R = torch.diag_embed(log_diagonal.exp())
        R[:, self.below[0], self.below[1]] = below
        z = (R @ (x - mean)[..., None])[..., 0]
        constant = 0.5 * self.dim * math.log(2 * math.pi)
        return 0.5 * z.square().sum(1) - log_diagonal.sum(1) + constant

    def default_steps(self, rows: int) -> int:
        return int(min(max(60 * rows**0.5, 1000), 5000))

    def default_rate(self, steps: int) -> float:
        return 3e-3


def gaussian_network(
    train: Pairs, validation: Pairs, test: Pairs, *, seed: int = 0, max_steps: int | None = None
) -> float:
    """Mean negative log-likelihood in nats of `test`, by the network that is best on `validation`;
    all are standardised."""
    generator = torch.Generator().manual_seed(seed)
    network = GaussianNetwork(train[0].shape[1], train[1].shape[1], generator)
    fit(
        network,
        train,
        validation=validation,
        seed=seed,
        max_steps=max_steps,
        batch_size=128,
        patience=PATIENCE,
        progress=False,
    )
    return network.validate(torch.from_numpy(np.column_stack(test))).mean().item()
