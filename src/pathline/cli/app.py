"""The command `pathline`, its exit codes and its one-line errors."""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from cyclopts import App
from cyclopts.exceptions import CycloptsError

from .. import __version__
from ..errors import DataWarning, PathlineError, SolveError, TrainingError
from .classifier import classifier, predict
from .deploy import convert, export
from .dynamics import dynamics, forecast
from .fit import density
from .posterior import conditional, posterior
from .reproduce import reproduce
from .solve import solve
from .use import check, report, sample, score

app = App(
    name="pathline",
    version=f"pathline {__version__}",
    help="Continuous-time deep learning: densities, classes and time series of tables of numbers, "
    "and optimal control.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
fit = App(name="fit", help="Fit a model to a file.")
fit.command(density)
fit.command(posterior)
fit.command(conditional)
fit.command(dynamics)
fit.command(classifier)
app.command(fit)
for command in (solve, sample, forecast, predict, score, check, report, reproduce, export, convert):
    app.command(command)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the work failed, 2 bad input or usage,
    130 interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", DataWarning)
        return _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(arguments: list[str]) -> int:
    try:
        result = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except CycloptsError as error:
        return _fail(BAD_INPUT, str(error))
    except (SolveError, TrainingError) as error:
        return _fail(FAILED, str(error))
    except PathlineError as error:
        return _fail(BAD_INPUT, str(error))
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted; --resume goes on from the last checkpoint")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _fail(FAILED, str(error))
    return result if isinstance(result, int) else DONE


def _fail(code: int, text: str) -> int:
    print("pathline: " + " ".join(text.split()), file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"pathline: warning: {message}", file=sys.stderr)
