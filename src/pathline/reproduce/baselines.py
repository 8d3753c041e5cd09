"""Classical densities to compare with, by scikit-learn, each at its best."""

import warnings

import numpy as np

COMPONENTS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90)
BANDWIDTHS = np.geomspace(0.02, 2.0, 16)  # in standard deviations of whitened data


def baselines(
    train: np.ndarray, validation: np.ndarray, test: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """Mean negative log-likelihood of `test` (nats, in the units of the data) under
    a Gaussian, a mixture of Gaussians with the number of components of least BIC, and a Gaussian
    kernel density whose bandwidth is best on `validation`.

    All are fitted to standardised rows (the mixture with reg_covar 1e-3 there), the kernel
    density to whitened ones. Arrays are (rows, columns).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import KernelDensity

    mean, std = train.mean(0), train.std(0)
    train, validation, test = ((x - mean) / std for x in (train, validation, test))
    units = np.log(std).sum()
    gaussian = GaussianMixture(1, reg_covar=0.0).fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixtures = [
            GaussianMixture(k, reg_covar=1e-3, max_iter=300, random_state=seed).fit(train)
            for k in COMPONENTS
            if k * 10 < len(train)
        ]
    mixture = min(mixtures, key=lambda model: model.bic(train))
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True).reshape(len(std), -1))
    whiten = vectors / np.sqrt(values)
    kernels = [KernelDensity(bandwidth=h).fit(train @ whiten) for h in BANDWIDTHS]
    kernel = max(kernels, key=lambda model: model.score(validation @ whiten))
    return {
        "Gaussian": units - gaussian.score(test),
        f"Gaussian mixture ({mixture.n_components} components)": units - mixture.score(test),
        f"kernel density (bandwidth {kernel.bandwidth:.2g})": units
        + 0.5 * np.log(values).sum()
        - kernel.score(test @ whiten) / len(test),
    }
