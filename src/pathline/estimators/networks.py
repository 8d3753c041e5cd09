"""Classification and regression by networks that are differential equations."""

from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..data.tables import scales
from ..errors import ArgumentError, unknown
from ..nets import TimeBasis
from ..networks import Classification, ContinuousNet, Regression, dense_net
from ..networks.architectures import DENSE_KINDS
from ..networks.objectives import Supervised
from ..train import fit
from .files import Saved
from .rows import FEWEST_ROWS, distinct, plain, seed_of

LABELS = (str, int, float)  # that JSON holds
RandomState = int | np.random.RandomState | None


class _Continuous(Saved, BaseEstimator):
    """What both share: the network, its training, and the scale of the features."""

    net_: ContinuousNet
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        *,
        dynamics: str = "hamiltonian",
        width: int = 32,
        steps: int = 8,
        horizon: float = 5.0,
        basis: str = "piecewise-linear",
        order: int = 4,
        method: str | None = None,
        gamma: float = 0.0,
        smoothness: float = 1e-4,
        decay: float = 1e-4,
        max_steps: int | None = None,
        batch_size: int = 256,
        learning_rate: float | None = None,
        patience: int = 15,
        random_state: RandomState = None,
        verbose: bool = False,
    ) -> None:
        self.dynamics = dynamics
        self.width = width
        self.steps = steps
        self.horizon = horizon
        self.basis = basis
        self.order = order
        self.method = method
        self.gamma = gamma
        self.smoothness = smoothness
        self.decay = decay
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.patience = patience
        self.random_state = random_state
        self.verbose = verbose

    def _train(
        self, rows: np.ndarray, targets: np.ndarray, weights: np.ndarray | None, outputs: int
    ) -> None:
        """Fits `net_` to different rows and their targets, (rows, any)."""
        if self.dynamics not in DENSE_KINDS:
            raise ArgumentError(unknown("`dynamics`", str(self.dynamics), DENSE_KINDS))
        self._center = np.average(rows, axis=0, weights=weights)
        spread = np.sqrt(np.average((rows - self._center) ** 2, axis=0, weights=weights))
        self._spread = scales(rows, spread)
        seed = seed_of(self.random_state)
        net = dense_net(
            self.dynamics,
            rows.shape[1],
            outputs,
            width=plain(self.width),
            steps=plain(self.steps),
            time=TimeBasis(self.basis, plain(self.order), float(self.horizon)),
            gamma=self.gamma,
            method=self.method,
            seed=seed,
        )
        run = fit(
            self._objective(net, outputs),
            (self._scaled(rows), targets),
            sample_weight=weights,
            seed=seed,
            max_steps=plain(self.max_steps),
            batch_size=plain(self.batch_size),
            learning_rate=self.learning_rate,
            patience=plain(self.patience),
            progress=bool(self.verbose),
        )
        self.net_ = net.double().eval()
        self.n_iter_ = run.steps

    def _objective(self, net: ContinuousNet, outputs: int) -> Supervised:
        raise NotImplementedError

    def _fitted(self) -> dict[str, Any]:
        names = getattr(self, "feature_names_in_", None)
        return {
            "columns": None if names is None else names.tolist(),
            "center": self._center.tolist(),
            "spread": self._spread.tolist(),
        }

    def _restore(self, fitted: dict[str, Any]) -> None:
        self.n_features_in_ = self.net_.config()["options"]["inputs"]
        if fitted["columns"] is not None:
            self.feature_names_in_ = _kept(fitted, "columns", self.n_features_in_, object)
        self._center = _kept(fitted, "center", self.n_features_in_)
        self._spread = _kept(fitted, "spread", self.n_features_in_)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        return (X - self._center) / self._spread

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            return self.net_(torch.tensor(self._scaled(X))).numpy()


def _kept(fitted: dict[str, Any], name: str, count: int, dtype: Any = np.float64) -> np.ndarray:
    """What `_fitted` gave by that name, (count,)."""
    found = np.array(fitted[name], dtype=dtype)
    if found.shape != (count,):
        raise ValueError(f"`{name}` must be ({count},), got {found.shape}")
    return found


class ContinuousClassifier(ClassifierMixin, _Continuous):
    """Classification by the flow of features along a stable differential equation.

    An affine layer lifts the rows to `width` features, z' = v(t, z) with weights that are functions
    of time moves them, and an affine classifier reads them. The default dynamics is Hamiltonian:
    perturbations neither explode nor vanish, however many steps there are. Columns are brought to
    mean 0 and variance 1. Rows that occur several times count as one with their weights summed, so
    integer weights are the same as repeated rows, and the order of the rows does not matter.

    Args:
        dynamics: a kind of `pathline.networks.dense_net`.
        width: features.
        steps, horizon: time steps, and the end of time.
        basis, order: of the weights in time, see `pathline.nets.TimeBasis`.
        method: of integration; that of the dynamics if None.
        gamma: diffusion of dynamics "antisymmetric".
        smoothness, decay: weights of half the integrals of |theta'(t)|^2 and |theta(t)|^2.
        max_steps: training steps; 1000 if None.
        batch_size: rows of a training step.
        learning_rate: the first of a cosine schedule; 0.01 if None.
        patience: stop after this many validations without improvement, of about fifty.
        random_state: int, RandomState or None, as in scikit-learn; decides the rows held out for
            validation (a tenth), the initial weights and the batches.
        verbose: show the progress of training on standard error.

    Attributes:
        classes_: the labels seen in `fit`.
        net_: the trained `ContinuousNet`, in double precision, of standardised columns.
        n_iter_: training steps taken.
        n_features_in_: number of columns seen in `fit`.
        feature_names_in_: names of the columns seen in `fit`, if they were all strings.

    Source: Haber and Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
    2017, arXiv 1705.03341.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> y = np.where((X**2).sum(1) < 1, "inside", "outside")
        >>> model = ContinuousClassifier(steps=4, max_steps=60, random_state=0).fit(X, y)
        >>> model.predict_proba(X[:3]).shape
        (3, 2)
    """

    classes_: np.ndarray

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "ContinuousClassifier":
        """Train on the rows of `X`, (n_samples, n_features), and their labels `y`, (n_samples,).

        Args:
            X: features.
            y: labels of any type.
            sample_weight: not negative, (n_samples,); only their proportions matter.

        Returns:
            The estimator itself.

        Raises:
            ValueError: an array is not finite, or the shapes don't fit; there are too few rows; or
                an argument is out of range.
            TrainingError: training diverged again and again.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=FEWEST_ROWS)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        rows, weights = distinct(np.column_stack([labels.astype(np.float64), X]), sample_weight)
        self._train(rows[:, 1:], rows[:, :1], weights, len(self.classes_))
        return self

    def _objective(self, net: ContinuousNet, outputs: int) -> Classification:
        return Classification(net, smoothness=self.smoothness, decay=self.decay, head=self.decay)

    def _fitted(self) -> dict[str, Any]:
        classes = self.classes_
        names = classes.tolist()
        if classes.dtype.kind not in "fiubUO" or not all(isinstance(x, LABELS) for x in names):
            raise ArgumentError(
                f"`classes_` must be text, numbers or truth values to be saved, got {names[0]!r}"
            )
        return super()._fitted() | {"classes": names, "dtype": classes.dtype.str}

    def _restore(self, fitted: dict[str, Any]) -> None:
        super()._restore(fitted)
        count = self.net_.config()["options"]["outputs"]
        self.classes_ = _kept(fitted, "classes", count, fitted["dtype"])

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits, (n_samples, n_classes); their difference, (n_samples,), of two classes."""
        logits = self._outputs(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, (n_samples, n_classes), in the order of `classes_`."""
        return softmax(self._outputs(X), axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Their logarithms, (n_samples, n_classes), also of those that are too small for a
        double."""
        return log_softmax(self._outputs(X), axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row, (n_samples,)."""
        best = self._outputs(X).argmax(1)
        return self.classes_[best]


class ContinuousRegressor(RegressorMixin, _Continuous):
    """Least-squares regression by the flow of features along a stable differential equation.

    The network, its arguments and the treatment of rows and weights are those of
    `ContinuousClassifier`; the targets are brought to mean 0 and variance 1 as well.

    Attributes:
        net_: the trained `ContinuousNet`, in double precision, of standardised columns and targets.
        n_iter_: training steps taken.
        n_features_in_: number of columns seen in `fit`.
        feature_names_in_: names of the columns seen in `fit`, if they were all strings.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> model = ContinuousRegressor(steps=4, max_steps=60, random_state=0)
        >>> model.fit(X, np.sin(X[:, 0])).predict(X[:3]).shape
        (3,)
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "ContinuousRegressor":
        """Train on the rows of `X` and their targets.

        Args:
            X: features, (n_samples, n_features).
            y: targets, (n_samples,) or (n_samples, n_targets).
            sample_weight: not negative, (n_samples,); only their proportions matter.

        Returns:
            The estimator itself.

        Raises:
            ValueError: an array is not finite, or the shapes don't fit; there are too few rows; or
                an argument is out of range.
            TrainingError: training diverged again and again.
        """
        X, y = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True,
            ensure_min_samples=FEWEST_ROWS,
        )  # fmt: skip
        targets = np.asarray(y, dtype=np.float64)
        self._is_vector = targets.ndim == 2
        targets = targets if self._is_vector else targets[:, None]
        count = targets.shape[1]
        rows, weights = distinct(np.column_stack([targets, X]), sample_weight)
        targets = rows[:, :count]
        self._middle = np.average(targets, axis=0, weights=weights)
        spread = np.sqrt(np.average((targets - self._middle) ** 2, axis=0, weights=weights))
        self._height = scales(targets, spread)
        self._train(rows[:, count:], (targets - self._middle) / self._height, weights, count)
        return self

    def _objective(self, net: ContinuousNet, outputs: int) -> Regression:
        return Regression(
            net, targets=outputs, smoothness=self.smoothness, decay=self.decay, head=self.decay
        )

    def _fitted(self) -> dict[str, Any]:
        more = {"middle": self._middle.tolist(), "height": self._height.tolist()}
        return super()._fitted() | more | {"vector": self._is_vector}

    def _restore(self, fitted: dict[str, Any]) -> None:
        super()._restore(fitted)
        count = self.net_.config()["options"]["outputs"]
        self._middle, self._height = (_kept(fitted, x, count) for x in ("middle", "height"))
        self._is_vector = bool(fitted["vector"])

    def predict(self, X: Any) -> np.ndarray:
        """The target of each row of `X`, shaped like `y` in `fit`."""
        outputs = self._outputs(X)
        found = self._middle + self._height * outputs
        return found if self._is_vector else found[:, 0]
