"""What `pathline.fit` minimises to train a network: cross entropy, or squares."""

import copy
from collections.abc import Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentError, DataError, ShapeError
from ..train import Loss, Objective, Rows
from .net import ContinuousNet

CHUNK = 1_024  # rows judged at a time
SMALL = 2**22  # rows times weights: a step below has no use for more than one thread


class Supervised(Objective):
    """The mean loss of rows (inputs, targets), side by side, and the regularisers of the weights.

    Args:
        net: from inputs (batch, *shape) to outputs.
        shape: of one input, such as (channels, height, width); flat rows if None.
        smoothness: weight of half the integral of |theta'(t)|^2.
        decay: weight of half the integral of |theta(t)|^2.
        head: weight of half the squares of the head's parameters.

    Raises:
        ArgumentError: a weight is negative.
    """

    model: ContinuousNet

    def __init__(
        self,
        net: ContinuousNet,
        *,
        shape: Sequence[int] | None = None,
        smoothness: float = 0.0,
        decay: float = 0.0,
        head: float = 0.0,
    ) -> None:
        super().__init__()
        for name, weight in (("smoothness", smoothness), ("decay", decay), ("head", head)):
            if not weight >= 0:
                raise ArgumentError(f"`{name}` must be at least 0, got {weight!r}")
        self.model, self.shape = net, None if shape is None else tuple(shape)
        self.smoothness, self.decay, self.head = smoothness, decay, head

    def of(self, net: ContinuousNet, shape: Sequence[int] | None = None) -> Self:
        """The same loss of another network, such as a deeper one; `shape` if it is another too."""
        other = copy.deepcopy(self)
        other.model, other.shape = net, self.shape if shape is None else tuple(shape)
        return other

    def settings(self) -> dict[str, Any]:
        shape = None if self.shape is None else list(self.shape)
        weights = {"smoothness": self.smoothness, "decay": self.decay, "head": self.head}
        return {"shape": shape, **weights}

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(rows,) of the network's outputs and (rows, columns) of targets."""
        raise NotImplementedError

    def outputs(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The network's outputs for a batch (rows, columns), and its targets (rows, rest)."""
        inputs, targets = self.split(batch)
        like = next(self.model.parameters())
        return self.model(inputs.to(like)), targets.to(like.device)

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (rows, *shape) and targets (rows, rest) of a batch; flat rows have one target.

        Raises:
            ShapeError: there are no columns left for the targets.
        """
        width = batch.shape[1] - self.columns if self.shape is None else prod(self.shape)
        if not 0 < width < batch.shape[1]:
            raise ShapeError(
                f"rows of data must hold the inputs and then the targets: {batch.shape[1]} columns "
                f"do not hold inputs of shape {self.shape or '(any,)'} and their targets"
            )
        inputs, targets = batch[:, :width], batch[:, width:]
        return inputs.reshape(len(batch), *(self.shape or (width,))), targets

    @property
    def columns(self) -> int:
        """Targets beside flat inputs."""
        return 1

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        each = self.losses(*self.outputs(batch))
        data = (each if weights is None else each * weights.to(each)).mean()
        terms, total = {"data": data.detach()}, data
        for name, weight, part in (
            ("smoothness", self.smoothness, self.model.smoothness),
            ("decay", self.decay, self.model.decay),
            ("head", self.head, self._head),
        ):
            if weight:
                value = part()
                terms[name] = value.detach()
                total = total + weight * value
        return Loss(total, terms)

    def _head(self) -> Tensor:
        squares = [p.square().sum() for p in self.model.head.parameters()]
        return 0.5 * torch.stack(squares).sum() if squares else torch.zeros(())

    @torch.no_grad()
    def judge(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets as the network is used: batch norm with its running statistics."""
        training = self.model.training
        self.model.eval()
        try:
            parts = [self.outputs(part) for part in batch.split(CHUNK)]
        finally:
            self.model.train(training)
        outputs, targets = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(targets)

    def validate(self, batch: Tensor) -> Tensor:
        return self.losses(*self.judge(batch))

    def check(self, rows: Rows) -> None:
        outputs, targets = self.judge(rows.take(slice(0, 1))[0])
        self.check_outputs(outputs, targets)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise a `ShapeError` where the outputs do not fit the targets."""

    def finish(self, rows: Rows) -> dict[str, Any]:
        outputs, targets = self.judge(rows.take(slice(None))[0])
        return self.metrics(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """What is reported of validation rows in the end."""
        return {}

    def threads(self, rows: int) -> int | None:
        count = sum(p.numel() for p in self.model.parameters())
        return 1 if rows * count < SMALL else None

    def default_rate(self, steps: int) -> float:
        return 0.01


class Classification(Supervised):
    """Cross entropy in nats of labels from 0: `fit(Classification(net), (x, labels))`.

    Labels are (rows, 1), or (rows, height * width) where the network labels pixels, by logits
    (rows, classes, height, width).

    Args:
        net, shape, smoothness, decay, head: as in `Supervised`.
        class_weights: factors of the losses of labels, (classes,), such as where few pixels are
            not background; ones if None.

    Raises:
        ArgumentError: a weight is negative.
        DataError: a label is none of the classes that the network knows; in `fit`, before training.
    """

    def __init__(
        self,
        net: ContinuousNet,
        *,
        shape: Sequence[int] | None = None,
        smoothness: float = 0.0,
        decay: float = 0.0,
        head: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(net, shape=shape, smoothness=smoothness, decay=decay, head=head)
        if class_weights is not None and not all(weight >= 0 for weight in class_weights):
            raise ArgumentError(f"`class_weights` must be at least 0, got {class_weights!r}")
        self.class_weights = None if class_weights is None else tuple(class_weights)

    def settings(self) -> dict[str, Any]:
        given = self.class_weights
        return super().settings() | {"class_weights": None if given is None else list(given)}

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        labels = targets.reshape(len(outputs), *outputs.shape[2:]).long()
        factors = None if self.class_weights is None else outputs.new_tensor(self.class_weights)
        each = F.cross_entropy(outputs, labels, weight=factors, reduction="none")
        return each.flatten(1).mean(1) if each.ndim > 1 else each

    def check(self, rows: Rows) -> None:
        super().check(rows)
        classes = self.judge(rows.take(slice(0, 1))[0])[0].shape[1]
        for batch, _ in rows.blocks():
            labels = self.split(batch)[1]
            wrong = (labels != labels.round()) | (labels < 0) | (labels >= classes)
            if bool(wrong.any()):
                raise DataError(
                    f"labels must be whole numbers from 0 to {classes - 1}, the classes of the "
                    f"network, got {labels[wrong][0].item():g}"
                )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        given = self.class_weights
        if given is not None and outputs.ndim > 1 and len(given) != outputs.shape[1]:
            raise ShapeError(
                f"`class_weights` must be one for each of the network's {outputs.shape[1]} "
                f"classes, got {len(given)}"
            )
        pixels = prod(outputs.shape[2:])
        if outputs.ndim < 2 or targets.shape[1] != pixels:
            raise ShapeError(
                f"logits of shape {tuple(outputs.shape)} need {pixels} label(s) a row, got "
                f"{targets.shape[1]}"
            )

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        labels = targets.reshape(len(outputs), *outputs.shape[2:]).long()
        return {"accuracy": (outputs.argmax(1) == labels).double().mean().item()}


class Regression(Supervised):
    """Half the squared distance to the targets: `fit(Regression(net, targets=2), (x, y))`.

    Args:
        net, shape, smoothness, decay, head: as in `Supervised`.
        targets: columns of the targets beside flat inputs.

    Raises:
        ArgumentError: a weight is negative, or `targets` no positive integer.
    """

    def __init__(
        self,
        net: ContinuousNet,
        *,
        targets: int = 1,
        shape: Sequence[int] | None = None,
        smoothness: float = 0.0,
        decay: float = 0.0,
        head: float = 0.0,
    ) -> None:
        super().__init__(net, shape=shape, smoothness=smoothness, decay=decay, head=head)
        if not isinstance(targets, int) or targets < 1:
            raise ArgumentError(f"`targets` must be a positive integer, got {targets!r}")
        self.targets = targets

    @property
    def columns(self) -> int:
        return self.targets

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs.flatten(1) - targets.to(outputs)).square().sum(1)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs[0].numel() != targets.shape[1]:
            raise ShapeError(
                f"the network gives {outputs[0].numel()} numbers a row, and the data hold "
                f"{targets.shape[1]} targets; say how many by `targets`"
            )

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        error = (outputs.flatten(1).double() - targets).square().mean()
        return {"rmse": error.sqrt().item()}
