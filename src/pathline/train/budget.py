"""From seconds to a number of steps."""

import math
from dataclasses import dataclass

VALIDATION_ROWS = 5_000  # watched during training
FEWEST_ROWS = 1_000  # watched where time is short, if there are so many
FINAL_ROWS = 2_000  # given to `Objective.finish`
AIM = 0.92  # of a budget in seconds; the rest is for what the warm-up can't foresee
PAUSES = 0.15  # most of the time that may go to validations, adaptions and saving
FINISH = 0.1  # most of the time that is set aside for `Objective.finish`
FINER = 2.0  # how much longer `Objective.finish` takes for a trained model than for a fresh one


@dataclass(frozen=True)
class Plan:
    """The course of a run, decided before its first step."""

    max_steps: int
    max_work: float  # steps, each counted by its cost over that of the first
    pause_every: int  # steps between validations
    watched_rows: int  # validation rows of each
    final_rows: int  # validation rows given to `Objective.finish`


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of training take, as measured in the warm-up."""

    step: float
    validation: float  # of one row
    adapt: float
    save: float
    finish: float  # of one row


def course(steps: int, rows: int) -> Plan:
    """The plan of `steps` steps with about fifty validations, on `rows` validation rows."""
    watched, final = min(rows, VALIDATION_ROWS), min(rows, FINAL_ROWS)
    return Plan(steps, math.inf, _pause_every(steps), watched, final)


def within(seconds: float, costs: Costs, rows: int, most: int | None = None) -> Plan:
    """The plan that takes about `seconds`, with at most `most` steps.

    Where time is short fewer rows are watched, then validations are fewer than fifty, and
    `finish` gets fewer rows.

    Args:
        seconds: what is left of the budget for the first validation, training and finish.
        costs: of the parts; all but `adapt` and `save` are positive.
        rows: validation rows.
        most: steps.
    """
    final_row, fixed = FINER * costs.finish, costs.adapt + costs.save
    final = _clip(FINISH * seconds / final_row, 100, min(rows, FINAL_ROWS))
    left = max(seconds - final_row * final - costs.save, costs.step)
    steps = (1 - PAUSES) * left / costs.step
    steps = min(steps, most or steps)
    fewest = min(rows, FEWEST_ROWS)
    pauses = max(1, PAUSES * left / (fixed + costs.validation * fewest))  # that can be paid
    every = max(_pause_every(int(steps)), math.ceil(steps / pauses))
    share = PAUSES * left * min(1, every / steps)  # of a pause
    watched = _clip((share - fixed) / costs.validation, fewest, min(rows, VALIDATION_ROWS))
    pause = fixed + costs.validation * watched
    # The first validation and the last pause come on top of those in between.
    work = (left - costs.validation * watched - pause) / (costs.step + pause / every)
    affordable = max(1, int(work))
    return Plan(min(affordable, most or affordable), float(affordable), every, watched, final)


def _pause_every(steps: int) -> int:
    return max(10, steps // 50)


def _clip(value: float, least: int, most: int) -> int:
    return int(min(max(value, least), most))
