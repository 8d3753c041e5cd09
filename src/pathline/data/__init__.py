"""Tables from files, checks that they can have a density, toy densities and real data sets."""

from .classes import ellipses, moons, peaks, peaks_function, q_tips, spirals
from .electricity import load_electricity
from .images import Images, load_images
from .labels import read_labelled, write_labelled
from .published import BENCHMARKS, is_published, load_mnist, load_published
from .recipe import Recipe, check_table, resolution
from .series import Series
from .splits import Splits
from .support import check_support, parse_support
from .tables import Table, column_index, read_table, write_table
from .toys import (
    TOYS,
    Checkerboard,
    Circles,
    EightGaussians,
    Moons,
    Pinwheel,
    SwissRoll,
    Toy,
    TwoSpirals,
)
from .uci import load_uci

__all__ = [
    "BENCHMARKS",
    "TOYS",
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "Images",
    "Moons",
    "Pinwheel",
    "Recipe",
    "Series",
    "Splits",
    "SwissRoll",
    "Table",
    "Toy",
    "TwoSpirals",
    "check_support",
    "check_table",
    "column_index",
    "ellipses",
    "is_published",
    "load_electricity",
    "load_images",
    "load_mnist",
    "load_published",
    "load_uci",
    "moons",
    "parse_support",
    "peaks",
    "peaks_function",
    "q_tips",
    "read_labelled",
    "read_table",
    "resolution",
    "spirals",
    "write_labelled",
    "write_table",
]
