"""OT-Flow on codes of handwritten digits: generated and interpolated images."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..data import Recipe, load_mnist, write_table
from ..flows import OTFlow
from ..report import finish_density
from ..train import Loss, Objective, fit
from ..train.files import open_run
from .experiment import Outcome, RunArguments

SOURCE = "Onken et al., OT-Flow (arXiv 2006.00104), and the authors' training script"
PIXELS = 28
SHARE = 0.3  # of a budget, for the autoencoder
ACROSS, DOWN = 16, 8  # images of a picture
BETWEEN = 10  # points of an interpolation, with its ends


class Autoencoder(nn.Module):
    """Images (batch, 784) with grey levels in [0, 1] to codes (batch, dim) and back, one layer
    each way: x -> K x + b -> sigmoid(L z + c).

    The authors' has a ReLU on the codes. It makes a third of them zero, where a density would be
    infinite, so here the codes are linear, which also halves the error of the images.
    """

    def __init__(self, dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = nn.Linear(PIXELS**2, dim)
        self.decoder = nn.Linear(dim, PIXELS**2)
        with torch.no_grad():
            for layer in (self.encoder, self.decoder):
                bound = layer.in_features**-0.5  # as in nn.Linear
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (batch, dim)."""
        z: Tensor = self.encoder(x.to(self.encoder.weight))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Images (batch, 784)."""
        return torch.sigmoid(self.decoder(z.to(self.decoder.weight)))

    def config(self) -> dict[str, Any]:
        """The arguments that build it again."""
        return {"dim": self.dim}

    def objective(self) -> "Reconstruction":
        """What `fit` minimises."""
        return Reconstruction(self)


class Reconstruction(Objective):
    """Mean squared error of the pixels."""

    model: Autoencoder

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor, weights: Tensor | None = None) -> Loss:
        return Loss(self.validate(batch).mean(), {})

    def validate(self, batch: Tensor) -> Tensor:
        return (self.model.decode(self.model.encode(batch)) - batch.float()).square().mean(1)

    def default_steps(self, rows: int) -> int:
        return 3000

    def default_rate(self, steps: int) -> float:
        return 3e-3

    def threads(self, rows: int) -> int | None:
        return 1 if rows <= 1024 else None  # the hand-over between threads would take longer


def run(arguments: RunArguments, size: str) -> Outcome:
    """Train an autoencoder on MNIST and OT-Flow on its codes, and draw images.

    Size small has codes of 64 numbers and default settings, and judges by every other test image:
    half the numbers of the authors' codes keep the digits legible, a training step of the flow
    takes a half of the time, and 32 numbers keep too little. Size full has codes of 128 and the
    authors' settings (width 128, 8 time steps, alpha_C 80, alpha_R 500, batch 800), and fetches
    MNIST where it is not on file.
    """
    splits = load_mnist(fetch=size == "full")
    open_run(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
    # From here on the folder is ours, and two runs share it.
    given = {k: v for k, v in asdict(arguments).items() if v is not None} | {"overwrite": True}
    dim = 128 if size == "full" else 64
    generator = torch.Generator().manual_seed(arguments.seed)
    autoencoder = Autoencoder(dim, generator=generator)
    coding: dict[str, Any] = {"out": arguments.out / "autoencoder"}
    modelling: dict[str, Any] = {}
    if size == "full":
        steps = 600 * len(splits.train) // 512
        coding |= {"learning_rate": 1e-3, "max_steps": min(steps, arguments.max_steps or steps)}
        flow = OTFlow(
            dim,
            128,
            2,
            transport=1 / 80,
            hjb=500 / 80,
            train_steps=8,
            trace="exact",
            generator=generator,
        )
        modelling = {"batch_size": 800, "learning_rate": 0.008, "max_steps": 50_000}
    else:
        flow = OTFlow(dim, generator=generator)
    if arguments.budget is not None:
        coding["budget"] = SHARE * arguments.budget
        given["budget"] = (1 - SHARE) * arguments.budget
    coded = fit(autoencoder, splits.train, validation=splits.validation, **(given | coding))
    with torch.no_grad():
        train, validation, test = (
            autoencoder.encode(torch.from_numpy(part)).double()
            for part in (splits.train, splits.validation, splits.test)
        )
    columns = tuple(f"code{i}" for i in range(dim))
    fit(
        flow,
        train,
        validation=validation,
        metadata={
            "experiment": "ot-flow-mnist",
            "source": splits.source,
            "recipe": Recipe.untouched(dim, columns).to_dict(),
        },
        **(modelling | given),
    )
    flow = models.load(arguments.out).double()
    images, test = (x if size == "full" else x[::2] for x in (torch.from_numpy(splits.test), test))
    samples = flow.sample(10_000, seed=arguments.seed)
    with torch.no_grad():
        error = (autoencoder.decode(test) - images).square().mean().item()
        pictures = [
            _generated(autoencoder, samples),
            _interpolated(autoencoder, flow, images),
            _coded(autoencoder, images, error),
        ]
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.mT.cov())
    metrics = finish_density(
        arguments.out,
        test.numpy(),
        columns,
        title="OT-Flow on codes of MNIST",
        classical={"Gaussian": -gaussian.log_prob(test).mean().item()},
        subtitle=splits.source,
        pictures=pictures,
    )
    write_table(arguments.out / "samples.csv", samples.numpy(), columns)
    figures = {"OT-Flow": metrics["nll"], **metrics["classical"]}
    lines = [
        f"negative log-likelihood of {len(test)} test codes of {dim} numbers (nats, in the "
        "units of these codes)",
        *(f"  {name:<9}  {value:9.4f}" for name, value in figures.items()),
        f"mean squared error of the decoded test images  {error:.5f}",
        "no published figure: the paper shows images; generated and interpolated ones are in "
        "report.html",
        metrics["check"]["verdict"],
        f"training took {coded.seconds:.0f} s (autoencoder) and {metrics['seconds']:.0f} s (flow); "
        f"data: {splits.source}",
    ]
    details = {
        "figures": figures,
        "code_dim": dim,
        "decoding_error": error,
        "check": metrics["check"],
        "train_seconds": metrics["seconds"],
        "autoencoder_seconds": coded.seconds,
    }
    return Outcome(metrics["nll"], None, SOURCE, "\n".join(lines), details)


Picture = tuple[str, str, np.ndarray]


def _sheet(images: Tensor, columns: int) -> np.ndarray:
    """Images (batch, 784) in rows of `columns`."""
    return images.reshape(-1, columns, PIXELS, PIXELS).float().numpy()


def _generated(autoencoder: Autoencoder, samples: Tensor) -> Picture:
    images = autoencoder.decode(samples[: ACROSS * DOWN])
    return (
        "Generated digits",
        "Samples of the flow, decoded; none was chosen.",
        _sheet(images, ACROSS),
    )


def _interpolated(autoencoder: Autoencoder, flow: OTFlow, images: Tensor) -> Picture:
    """Test images in pairs, and what lies between them in the reference space."""
    first, last = images[:DOWN], images[DOWN : 2 * DOWN]
    z0, z1 = (flow.to_reference(autoencoder.encode(x).double()) for x in (first, last))
    share = torch.linspace(0, 1, BETWEEN, dtype=torch.float64)[:, None, None]
    # On a circle rather than a chord: points of the middle would have too small a norm.
    angle = torch.nn.functional.cosine_similarity(z0, z1).clamp(-0.999, 0.999).acos()[:, None]
    z = (torch.sin((1 - share) * angle) * z0 + torch.sin(share * angle) * z1) / torch.sin(angle)
    codes = flow.from_reference(z.transpose(0, 1).reshape(-1, flow.dim))
    between = autoencoder.decode(codes).reshape(DOWN, BETWEEN, -1)
    rows = torch.cat([first[:, None], between, last[:, None]], 1)
    return (
        "Interpolated digits",
        "The outermost images of each row are test images. Their codes are carried to the normal "
        "reference, where the points between them are taken, and back.",
        _sheet(rows.flatten(0, 1), BETWEEN + 2),
    )


def _coded(autoencoder: Autoencoder, images: Tensor, error: float) -> Picture:
    shown = images[: 2 * ACROSS].reshape(2, ACROSS, -1)
    decoded = autoencoder.decode(autoencoder.encode(shown.flatten(0, 1))).reshape(shown.shape)
    rows = torch.stack([shown, decoded], 1).flatten(0, 2)
    return (
        "Digits and their codes",
        "Test images, and below each what its code keeps of it: no sample can be sharper. The "
        f"mean squared error of a pixel, between 0 and 1, is {error:.5f}.",
        _sheet(rows, ACROSS),
    )
