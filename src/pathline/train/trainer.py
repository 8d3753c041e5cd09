"""The training loop: steps, validations, retreats, checkpoints."""

import copy
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..errors import ArgumentError, TrainingError
from . import budget, files, recipe
from .objective import Distrust, Loss, Objective
from .progress import Reporter
from .rows import Rows

CHECKPOINT = Path("checkpoint", "state.safetensors")  # in the folder of a run
CHECK_ROWS = 1_024  # given to `Objective.adapt`
RETREATS = 8  # divergences in a row before training gives up
WARM_UP = 0.03  # of the budget, for timing steps
REHEARSED_ROWS = 100  # of `Objective.finish`


@dataclass
class Run:
    """What training did. The model that was passed to `fit` holds the best weights."""

    steps: int
    best_step: int
    validation: float  # of the best model, as `Objective.validate` measures it
    seconds: float
    stopped: str  # "steps" or "early"
    history: list[dict[str, float]]  # one entry for each logged step
    events: list[str]  # what the objective adapted and where training retreated, in words
    metrics: dict[str, Any]
    out: Path | None


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit` that decide its result."""

    seed: int
    max_steps: int | None
    budget: float | None
    batch_size: int
    learning_rate: float | None
    patience: int
    optimizer: str | None = None


@dataclass
class Standing:
    """Where training stands; with the tensors, all that a checkpoint holds."""

    max_steps: int = 0
    max_work: float = math.inf  # this and the next three: as in `budget.Plan`
    pause_every: int = 0
    learning_rate: float = 0.0  # the first
    watched_rows: int = 0
    final_rows: int = 0
    step: int = 0
    work: float = 0.0
    seconds: float = 0.0
    first_loss: float = math.inf
    least_loss: float = math.inf  # where training paused
    validation: float = math.inf  # when training last paused
    best: float = math.inf
    best_step: int = 0
    stale: int = 0  # validations since the best
    shrink: float = 1.0  # of the learning rate, after retreats
    retreats: int = 0  # in a row
    finished: str = ""
    objective: dict[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def progress(self) -> float:
        """From 0 to 1 at the end."""
        return max(self.step / self.max_steps, self.work / self.max_work)


class Trainer:
    """One training run, in one of its processes."""

    def __init__(
        self,
        objective: Objective,
        rows: Rows,
        held: Rows,
        settings: Settings,
        *,
        devices: int,
        nodes: int,
        strategy: str,
    ) -> None:
        from lightning_fabric import Fabric  # here, because importing it takes long

        self.objective, self.rows, self.held, self.settings = objective, rows, held, settings
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // devices
        self.fabric = Fabric(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
        )
        if devices * nodes > 1:
            self.fabric.launch()
        self.leader = self.fabric.is_global_zero
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.at = Standing()
        self.best: dict[str, Tensor] = {}  # weights of the best model
        self.history: list[dict[str, float]] = []
        self.interrupted = threading.Event()
        self.folder: Path | None = None

    def run(
        self,
        folder: Path | None,
        *,
        resume: bool,
        shown: bool,
        tensorboard: bool,
        metadata: dict[str, Any],
    ) -> Run:
        """Train, and leave the best weights in the objective's model, in evaluation mode."""
        self.started = time.perf_counter()
        self.folder, self.metadata = folder, metadata
        self.threads = torch.get_num_threads()
        with _threads(self.objective.threads(self.settings.batch_size)):
            return self._run(folder, resume, shown, tensorboard)

    def _run(self, folder: Path | None, resume: bool, shown: bool, tensorboard: bool) -> Run:
        home = next(self.objective.parameters()).device
        config = self._config() if folder else {}
        found = files.read_checkpoint(folder / CHECKPOINT) if folder and resume else None
        if found:
            self._check_same_run(config)
        self.objective.to(self.fabric.device).train()
        if not found:
            self.objective.prepare(self.rows, self.generator)
        self.optimizers = []
        if self.settings.optimizer != "lbfgs":
            self.optimizers = recipe.optimizers(self.objective, self.objective.inner_weights())
        self._set_up()
        if found:
            tensors, standing = found
            plan = asdict(budget.course(standing["max_steps"], len(self.held)))
            plan["learning_rate"] = self._first_rate(plan["max_steps"])
            self.at = Standing(**plan | standing)  # a checkpoint of 0.1.0 knows only its steps
            self._set_tensors(tensors)
            self.generator.set_state(tensors["generator"])
        else:
            plan = asdict(self._plan())
            plan["learning_rate"] = self._first_rate(plan["max_steps"])
            vars(self.at).update(plan)
        self.watched = self._head(self.held, self.at.watched_rows)
        if not found and not math.isfinite(self._validate()):
            raise TrainingError("the validation loss is not finite before training begins")
        self.good = self._snapshot()
        if folder and self.leader:
            files.write_json(folder / "config.json", config | {k: vars(self.at)[k] for k in plan})
            self._trim_log()
        self.reporter = Reporter(self.at.max_steps, shown=shown and self.leader, done=self.at.step)
        with (
            self._interruptible(),
            self.reporter,
            _event_writer(folder if tensorboard and self.leader else None) as self.board,
        ):
            interrupted = self._loop()
        self.objective.model.load_state_dict(self.best)
        self.objective.eval()
        metrics = {} if interrupted else self._finish()
        self.objective.to(home)
        if interrupted:
            raise KeyboardInterrupt
        at = self.at
        return Run(
            at.step, at.best_step, at.best, at.seconds, at.finished, self.history, at.events,
            metrics, folder,
        )  # fmt: skip

    def _set_up(self) -> None:
        """Let Fabric wrap module and optimisers where there are several processes.

        A single one does without: the wrappers take longer than a small step.
        """
        self.parameters = list(self.objective.parameters())
        self.module: Callable[..., Loss] = self.objective
        self.wrapped: list[Any] = self.optimizers
        if self.fabric.world_size > 1:
            self.module, *self.wrapped = self.fabric.setup(self.objective, *self.optimizers)

    def _loop(self) -> bool:
        """Train to the end; true if the user interrupted it."""
        at = self.at
        log_every = max(1, at.max_steps // 200)
        clock = time.perf_counter()
        while not at.finished:
            rate = at.shrink * recipe.cosine(at.progress()) * at.learning_rate
            loss, share = self._step(rate)
            figure, stop = self._agree(loss.total.detach() * share)
            at.step += 1
            at.work += self.objective.effort()
            last = at.progress() >= 1
            if at.step == 1:
                at.first_loss = figure
            at.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            if math.isfinite(figure) and (at.step % log_every == 0 or last):
                self._log(figure, {k: v * share for k, v in loss.terms.items()}, rate)
            if not math.isfinite(figure):
                self._retreat("the loss is not finite")
            elif at.step % at.pause_every == 0 or last:
                self._pause(figure)
            if self.history:
                self.reporter.update(at.step, self.history[-1])
            if stop:
                self._checkpoint(self._snapshot())
                return True
        return False

    def _step(self, rate: float) -> tuple[Loss, float]:
        """One step of the optimisers; the loss of this process's rows, and its factor in the mean
        over processes."""
        recipe.set_rate(self.optimizers, rate)
        whole, world = self._draw(self.settings.batch_size), self.fabric.world_size
        index = whole[self.fabric.global_rank :: world]
        share = len(index) * world / len(whole)  # so that the mean over processes is the batch's
        batch, weights = self.rows.take(index)
        batch = batch.to(self.fabric.device)
        weights = None if weights is None else weights.to(self.fabric.device)
        if self.settings.optimizer == "lbfgs":
            return self._settle(batch, weights), share
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.module(batch, weights)
        if world == 1:
            loss.total.backward()
        else:
            self.fabric.backward(loss.total * share)
        for optimizer in self.wrapped:
            optimizer.step()
        self.objective.constrain()
        return loss, share

    def _settle(self, batch: Tensor, weights: Tensor | None) -> Loss:
        """Several iterations of L-BFGS on one batch; the loss at their end."""
        state = copy.deepcopy(self.objective.state())

        def evaluate() -> Loss:
            self.objective.restore(state)  # the same randomness each time
            return self.objective(batch, weights)

        recipe.quasi_newton(self.parameters, lambda: evaluate().total, self.at.shrink)
        self.objective.constrain()
        return evaluate()

    def _draw(self, size: int) -> Tensor:
        """Indices of `size` random training rows, or of all if there are no more."""
        if size >= len(self.rows):
            return torch.arange(len(self.rows))
        return torch.randint(len(self.rows), (size,), generator=self.generator)

    def _agree(self, loss: Tensor) -> tuple[float, bool]:
        """The loss over all processes, and whether one of them was interrupted."""
        stop = self.interrupted.is_set()
        if self.fabric.world_size == 1:
            return loss.item(), stop
        both = torch.stack([loss.double(), torch.full_like(loss, float(stop)).double()])
        mean, stops = self._mean(both).tolist()
        return mean, stops > 0

    def _mean(self, value: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return value
        result = self.fabric.all_reduce(value, reduce_op="mean")
        assert isinstance(result, Tensor)
        return result

    def _pause(self, loss: float) -> None:
        """Validate, adapt, save."""
        at = self.at
        if loss - at.least_loss > 10 * max(1.0, at.first_loss - at.least_loss):
            return self._retreat(f"the loss rose to {loss:.4g}")
        if not math.isfinite(self._validate()):
            return self._retreat("the validation loss is not finite")
        try:
            message = self._adapt()
        except Distrust as reason:
            return self._retreat(str(reason), shrink=0.8)
        at.least_loss = min(at.least_loss, loss)
        at.retreats = 0
        if message:
            self._event(f"step {at.step}: {message}")
        if at.progress() >= 1:
            at.finished = "steps"
        elif at.stale >= self.settings.patience:
            at.finished = "early"
        self.good = self._snapshot()
        self._checkpoint(self.good)

    def _try_adapt(self) -> None:
        with suppress(Distrust):
            self._adapt()

    def _adapt(self) -> str | None:
        batch, _ = self.rows.take(self._draw(CHECK_ROWS))
        return self.objective.adapt(batch.to(self.fabric.device))

    def _judge(self, rows: Rows) -> float:
        """Mean of the objective's figure over `rows`, each process taking its part."""
        device = self.fabric.device
        index = torch.arange(self.fabric.global_rank, len(rows), self.fabric.world_size)
        total = torch.zeros((), dtype=torch.float64, device=device)
        if len(index):
            x, w = rows.take(index)
            values = self.objective.validate(x.to(device)).double()
            total = (values if w is None else values * w.to(values)).sum()
        return self._mean(total).item() * self.fabric.world_size / len(rows)

    def _validate(self) -> float:
        """Judge by the watched rows; remember the best model."""
        at, value = self.at, self._judge(self.watched)
        at.validation = value
        if value < at.best:
            at.best, at.best_step, at.stale = value, at.step, 0
            self.best = _clone(self.objective.model.state_dict())
        else:
            at.stale += 1
        return value

    def _retreat(self, reason: str, shrink: float = 0.5) -> None:
        """Back to the last good state with a smaller learning rate."""
        at, step = self.at, self.at.step
        kept: dict[str, Any] = {"retreats": at.retreats + 1, "shrink": shrink * at.shrink}
        kept |= {"events": at.events, "seconds": at.seconds, "work": at.work}
        if at.retreats >= RETREATS:
            self.objective.model.load_state_dict(self.best)
            raise TrainingError(
                f"training diverged {RETREATS} times in a row at step {step} ({reason}); the "
                "best model is kept. Try a smaller learning rate"
            )
        standing, tensors = self.good
        vars(at).update(vars(copy.deepcopy(standing)) | kept)
        self._set_tensors(tensors)
        self.history = [entry for entry in self.history if entry["step"] <= at.step]
        if self.folder and self.leader:
            self._rewrite_log()
        self.objective.caution()
        self._event(f"step {step}: {reason}; back to step {at.step}, rate x {at.shrink:.3g}")

    def _first_rate(self, steps: int) -> float:
        return self.settings.learning_rate or self.objective.default_rate(steps)

    def _plan(self) -> budget.Plan:
        seconds, steps, rows = self.settings.budget, self.settings.max_steps, len(self.held)
        if seconds is None:
            steps = steps or self.objective.default_steps(len(self.rows))
            return budget.course(steps, rows)
        costs = self._rehearse(seconds)
        left = budget.AIM * seconds - self._slowest(time.perf_counter() - self.started)
        return budget.within(left, costs, rows, steps)

    def _rehearse(self, seconds: float) -> budget.Costs:
        """Time the parts of training, and leave no trace."""
        standing, tensors = self._snapshot()
        steps: list[float] = []
        while len(steps) < 3 or (len(steps) < 50 and sum(steps) < WARM_UP * seconds):
            steps.append(self._timed(lambda: self._step(self._first_rate(1000))))
        few = self._head(self.held, budget.FEWEST_ROWS)
        validation = self._timed(lambda: self._judge(few)) / len(few)
        adapt = self._timed(self._try_adapt)
        save = self._timed(self._rehearse_save)
        few = self._head(self.held, REHEARSED_ROWS)
        copied = copy.deepcopy(self.objective)
        finish = self._timed(lambda: copied.finish(few)) / len(few)
        self.at = standing
        self._set_tensors(tensors)
        self.generator.set_state(tensors["generator"])
        return budget.Costs(statistics.median(steps[1:]), validation, adapt, save, finish)

    def _rehearse_save(self) -> None:
        self.best = _clone(self.objective.model.state_dict())
        snapshot = self._snapshot()
        if self.folder and self.leader:
            (self.folder / "checkpoint").mkdir(exist_ok=True)
            with (
                suppress(OSError),
                tempfile.TemporaryDirectory(dir=self.folder / "checkpoint") as folder,
            ):
                self._save(Path(folder), snapshot, best=True)

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes in the slowest process."""
        clock = time.perf_counter()
        work()
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return self._slowest(time.perf_counter() - clock)

    def _slowest(self, seconds: float) -> float:
        if self.fabric.world_size == 1:
            return seconds
        every = torch.tensor(seconds, device=self.fabric.device)
        result = self.fabric.all_reduce(every, reduce_op="max")
        assert isinstance(result, Tensor)
        return result.item()

    @staticmethod
    def _head(rows: Rows, count: int) -> Rows:
        return rows.subset(torch.arange(min(len(rows), count)))

    def _finish(self) -> dict[str, Any]:
        at = self.at
        metrics = {
            "steps": at.step,
            "best_step": at.best_step,
            "validation_loss": at.best,
            "seconds": round(at.seconds, 3),
            "stopped": at.finished,
            "events": at.events,
            **self.objective.finish(self._head(self.held, at.final_rows)),
        }
        if self.folder and self.leader:
            files.save(self.objective.model, self.folder / "model", metadata=self.metadata)
            files.write_json(self.folder / "metrics.json", metrics)
        return metrics

    # Saving and restoring

    def _snapshot(self) -> tuple[Standing, dict[str, Tensor]]:
        """All that training needs to go on from here."""
        tensors = {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, optimizer in enumerate(self.optimizers):
            tensors |= files.flatten(f"optimizer{i}", optimizer.state_dict()["state"])
        self.at.objective = self.objective.state()
        return copy.deepcopy(self.at), _clone(tensors) | {"generator": self.generator.get_state()}

    def _set_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.objective.load_state_dict(_part(tensors, "objective."))
        self.objective.restore(self.at.objective)
        self.best = _part(tensors, "best.")
        for i, optimizer in enumerate(self.optimizers):
            groups = optimizer.state_dict()["param_groups"]
            state = files.unflatten(f"optimizer{i}", tensors)
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _checkpoint(self, snapshot: tuple[Standing, dict[str, Tensor]]) -> None:
        if not (self.folder and self.leader):
            return
        best = self.at.best_step == self.at.step or not (self.folder / "model").exists()
        try:
            self._save(self.folder, snapshot, best=best)
        except OSError as error:
            self._event(
                f"step {self.at.step}: the checkpoint can't be written ({error}); the previous "
                "one is kept"
            )

    def _save(
        self, folder: Path, snapshot: tuple[Standing, dict[str, Tensor]], *, best: bool
    ) -> None:
        """Write the checkpoint, and the best model if `best`."""
        standing, tensors = snapshot
        files.write_checkpoint(folder / CHECKPOINT, tensors, asdict(standing))
        if not best:
            return
        model = self.objective.model
        now = _clone(model.state_dict())
        model.load_state_dict(self.best)
        try:
            files.save(model, folder / "model", metadata=self.metadata)
        finally:
            model.load_state_dict(now)

    def _config(self) -> dict[str, Any]:
        """Everything that decides the result, and what it ran on."""
        model = self.objective.model
        return {
            "model": {"kind": type(model).__name__, **_configuration(model)},
            "objective": self.objective.settings(),
            "settings": asdict(self.settings),
            "data": {
                "rows": len(self.rows),
                "validation_rows": len(self.held),
                "columns": self.rows.columns,
                "sha256": _digest(self.rows),
                "validation_sha256": _digest(self.held),
            },
            "processes": self.fabric.world_size,
            "threads": self.threads,
            "choices": self.objective.choices(),
            "device": str(self.fabric.device),
            "versions": {
                "pathline": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "metadata": self.metadata,
        }

    def _check_same_run(self, config: dict[str, Any]) -> None:
        assert self.folder
        before = files.read_json(self.folder / "config.json")
        for part in ("model", "objective", "settings", "data"):
            for name, value in config[part].items():
                old = before.get(part, {}).get(name)
                if value is None and name in ("max_steps", "budget"):
                    continue  # the checkpoint knows the number of steps
                if old != value:
                    raise ArgumentError(
                        f"the run in {self.folder} was started with another {name} of its {part}: "
                        f"{old!r}, now {value!r}; --overwrite starts again"
                    )

    # What the user sees

    def _log(self, loss: float, terms: dict[str, Tensor], rate: float) -> None:
        entry = {"step": self.at.step, "seconds": round(self.at.seconds, 3), "loss": loss}
        entry |= {name: self._mean(value).item() for name, value in terms.items()}
        entry["validation"] = self.at.validation
        entry["learning_rate"] = rate
        self.history.append(entry)
        if not self.leader:
            return
        if self.folder:
            try:
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                self._event(f"step {self.at.step}: the log can't be written ({error})")
        if self.board:
            for name in entry.keys() - {"step", "seconds"}:
                self.board.add_scalar(name, entry[name], entry["step"])

    def _event(self, text: str) -> None:
        self.at.events.append(text)
        self.reporter.say(text)

    def _trim_log(self) -> None:
        """Drop what was logged after the checkpoint; take the rest as history."""
        assert self.folder
        log = self.folder / "log.jsonl"
        if log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that a kill cut short
                    break
                if entry["step"] <= self.at.step:
                    self.history.append(entry)
        self._rewrite_log()

    def _rewrite_log(self) -> None:
        assert self.folder
        text = "".join(json.dumps(entry) + "\n" for entry in self.history)
        log = self.folder / "log.jsonl"
        files.write_atomically(log, lambda temporary: temporary.write_text(text))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop training after the step at hand; a second Ctrl-C at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            self.interrupted.set()

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def is_leader() -> bool:
    """Whether this process is the one that writes files and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """With `count` CPU threads, if it is not None."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(min(count or before, before))
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _event_writer(folder: Path | None) -> Iterator[Any]:
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ArgumentError(
            "TensorBoard is not installed; pip install 'pathline[tensorboard]'"
        ) from None
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        yield writer


def _configuration(model: torch.nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return dict(config()) if config else {}


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for x, w in rows.blocks():
        digest.update(x.cpu().numpy().tobytes())
        if w is not None:
            digest.update(w.cpu().numpy().tobytes())
    return digest.hexdigest()


def _clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
