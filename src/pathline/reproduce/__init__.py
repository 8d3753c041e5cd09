"""The published experiments, each by its name.

Adding one: a function `(RunArguments, size) -> Outcome` and its entry in `EXPERIMENTS`.
"""

from functools import partial

from ..control.problems import PROBLEMS
from ..data import BENCHMARKS
from ..models import NAMED
from . import (
    conditional,
    control,
    do_vs_od,
    do_vs_od_classifier,
    games,
    gradients,
    images,
    inference,
    lean,
    mgic,
    mnist,
    multilevel,
    networks,
    neuron,
    published,
    resolution,
    sbi_benchmark,
    stochastic_games,
    tables,
    toys,
    transport,
    weights,
)
from .experiment import Experiment as Experiment
from .experiment import Outcome as Outcome
from .experiment import RunArguments as RunArguments

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "RunArguments"]

EXPERIMENTS = {
    **{
        f"ot-flow-{name}": Experiment(f"OT-Flow on the toy density {name}", partial(toys.run, name))
        for name in toys.PAPER
    },
    **{
        f"ot-flow-{name.replace('_', '-')}": Experiment(
            f"OT-Flow on the real table {name}, beside classical densities",
            partial(tables.run, name),
        )
        for name in tables.TABLES
    },
    **{
        f"{method}-{name}": Experiment(
            f"{flow.label} on the benchmark table {name.upper()}, beside the published figures",
            partial(published.run, method, name),
        )
        for method, flow in published.METHODS.items()
        for name in BENCHMARKS
    },
    "ot-flow-mnist": Experiment(
        "OT-Flow on codes of MNIST's digits: generated and interpolated images", mnist.run
    ),
    "do-vs-od-gradient": Experiment(
        "gradients of the discrete and the continuous adjoint: errors and memory",
        gradients.run,
    ),
    "do-vs-od-time-series": Experiment(
        "a spiral, learned by discretize-optimize and by optimize-discretize",
        do_vs_od.run_time_series,
    ),
    **{
        f"do-vs-od-cnf-{name}": Experiment(
            f"a flow of {name}, trained by discretize-optimize and by optimize-discretize",
            partial(do_vs_od.run_cnf, name),
        )
        for name in do_vs_od.SMALL
    },
    "do-vs-od-classifier": Experiment(
        "peaks, classified by discretize-optimize and by optimize-discretize; gains against depth",
        do_vs_od_classifier.run,
    ),
    **{
        f"{method}-uci-{name}": Experiment(
            f"the conditional density of the table {name} by {label}, beside Gaussians",
            partial(conditional.run, method, name),
        )
        for method, label in conditional.LABELS.items()
        for name in conditional.TABLES
    },
    **{
        f"{method}-lotka-volterra": Experiment(
            f"posteriors of a stochastic Lotka-Volterra process by {label}, beside SMC-ABC",
            partial(inference.run_lotka_volterra, method),
        )
        for method, label in conditional.LABELS.items()
    },
    **{
        f"{method}-shallow-water": Experiment(
            f"the depths of a sea from the waves on its surface by {label}",
            partial(inference.run_shallow_water, method),
        )
        for method, label in conditional.LABELS.items()
    },
    **{
        name: Experiment(
            f"{named.summary}: {control.FIGURES[name].label}", partial(control.run, name)
        )
        for name, named in PROBLEMS.items()
    },
    "quadcopter-robustness": Experiment(
        "quadcopter policies trained with and without noise, in noise and under shocks",
        control.run_robustness,
    ),
    "neuron-feedback": Experiment(
        "the neuron with feedback, without, and without stimulation: from far starts, and shocked",
        neuron.run,
    ),
    **{
        f"mfg-{name}" + (f"-{dim}" if dim else ""): Experiment(
            f"{NAMED[name].summary.split(',')[0]}, {dim or 2} dimensions: {figure.label}",
            partial(games.run, name, dim),
        )
        for name, figure in games.FIGURES.items()
        for dim in (None, *figure.dims)
    },
    "mfg-stochastic": Experiment(
        "a crowd in noise, for three viscosities and in 2, 50 and 100 dimensions",
        stochastic_games.run_stochastic,
    ),
    "mfg-hjb-ablation": Experiment(
        "transport trained with two time steps, with and without penalties of the HJB equation",
        games.run_ablation,
    ),
    **{
        name: Experiment(
            f"stable networks on {name.replace('-', ' ')}: accuracy and gain of three dynamics",
            partial(networks.run, name),
        )
        for name in networks.SETTINGS
    },
    "transport-view": Experiment(
        "two moons: how features flow, and carry the classifier, as an animation", transport.run
    ),
    **{
        f"pde-cnn-{name.replace('10', '')}": Experiment(
            f"parabolic and hyperbolic networks on {label}, beside a plain residual one",
            partial(images.run_pde_cnn, name),
        )
        for name, label in {"mnist": "MNIST", "cifar10-subset": "a part of CIFAR-10"}.items()
    },
    "imexnet-qtips": Experiment(
        "labels of pixels by far ends of bars: semi-implicit and explicit steps",
        images.run_q_tips,
    ),
    **{
        f"lean-{name}": Experiment(
            f"full and lean convolutions on {label}: accuracy, weights and multiplications",
            partial(lean.run, name),
        )
        for name, label in {"digits": "small digits", "mnist": "MNIST"}.items()
    },
    "mgic-digits": Experiment(
        "multigrid in channels on small digits, beside full blocks and blocks in groups",
        mgic.run_digits,
    ),
    "mgic-mixing": Experiment(
        "a mixing of all channels by multigrid blocks: error against the number of levels",
        mgic.run_mixing,
    ),
    "multilevel-depth": Experiment(
        "peaks by more and more layers, and by all of them at once: accuracy and work",
        multilevel.run,
    ),
    "multilevel-resolution": Experiment(
        "a network of coarse images on fine ones: kernels moved in three ways, and trained on",
        resolution.run,
    ),
    "legendre-surrogate": Experiment(
        "weights in time by Legendre's polynomials and by monomials: errors and stable rates",
        weights.run,
    ),
    "sbi-benchmark": Experiment(
        "tasks of the sbi benchmark by COT-Flow and PCP-Map, beside the published figures of NPE",
        sbi_benchmark.run,
    ),
}
