"""A sweep on disk, which is its only state: sweep.json, and a run folder per trial.

data/sweeps/<name>-<8 hex digits of base, space, search, data>/runs/<run id>/: files of `fer.train`, and trial.json.
"""

import csv
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fer.data.dataset import DataSet
from fer.errors import UserError
from fer.files import is_held, write_json
from fer.formats import format_of, read_run
from fer.resources import Resources
from fer.run import FORMAT, Run, run_id
from fer.run_folder import BEST, LAST, METRICS, read_rows, read_summary
from fer.settings import check, differing, flatten
from pipelines.experiments import Experiment, Job
from pipelines.sweeps import settings
from pipelines.sweeps import space as spaces
from pipelines.sweeps.files import ABOUT, NOTE, RESULT, read_about, read_note, read_result, without
from pipelines.sweeps.settings import Sweep
from pipelines.sweeps.space import Known, Point, Space

SWEEPS = Path("data/sweeps")
LAYOUT = 3  # of a sweep's folder; 1 and 2 had trials/<number>/ and other schedulers
# states of a trial; pruned: stopped by the scheduler, or interrupted
RUNNING, DONE, PRUNED, FAILED = "running", "done", "pruned", "failed"
SEARCHED = "searched"  # in sweep.json: the part of the budget for which the search is over
# settings that make it another sweep if they change; the budget may grow and the machine may change
SAME = ("base", "seed", "search", "scheduler", "grace_epochs", "reduction", "space")


@dataclass(frozen=True)
class Plan:
    """A sweep with its current settings, and its folder."""

    name: str
    sweep: Sweep
    base: Experiment
    resources: Resources  # of a trial, which is a single process
    space: Space
    data: Path  # folder of the data set
    data_hash: str
    folder: Path
    root: Path  # of the project

    @property
    def published(self) -> Point:
        """The point that is the base."""
        return spaces.params_of(self.base.run, self.space)

    def run(self, point: Point) -> Run:
        """The run of a point. Raises UserError if its values do not fit together."""
        run, faults = spaces.changed(self.base.run, self.space, Known(point))
        if run is None:
            raise UserError(f"sweep {self.name}: space: {point} cannot work: {faults[0]}")
        return run

    def id_of(self, point: Point) -> str:
        """The run id of a point."""
        return run_id(self.base.name, self.run(point), self.data_hash)

    def job(self, point: Point) -> Job:
        """The trial of a point: a run in the sweep's folder."""
        folder = self.root / self.folder / "runs" / self.id_of(point)
        return Job(self.base.name, self.run(point), self.resources, self.root / self.data, folder)


@dataclass(frozen=True)
class Trial:
    """A trial: its point, and how far it got."""

    number: int  # 1 is the base
    point: Point
    state: str
    error: str | None
    folder: Path
    rows: tuple[dict[str, Any], ...] = ()  # of metrics.jsonl

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def best(self) -> float | None:
        """The best val accuracy so far."""
        return max((row["val_accuracy"] for row in self.rows), default=None)

    @property
    def seconds(self) -> float:
        """Training time."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """Sorts trials from worst to best; of those that were stopped, who got further is better."""
        done = self.state == DONE  # at its last epoch, or by `patience` before it
        return self.state != FAILED, done, 0 if done else self.epoch, self.best or 0.0


def plan(words: list[str], machine: dict[str, Any], data_of: Callable[[Experiment], DataSet]) -> Plan:
    """The sweep named in `words`, with the changes there. `data_of`: opens the data set of its base.

    Raises UserError if it does not exist or cannot work.
    """
    name, sweep, base, space = settings.load(words, machine)
    data = data_of(base)
    device = base.resources.device if sweep.gpus_per_trial else "cpu"
    of_trial = {"workers": 1, "cpus_per_worker": sweep.cpus_per_trial, "gpus_per_worker": 1.0, "device": device}
    resources = Resources.model_validate(base.resources.model_dump() | of_trial)
    folder = SWEEPS / f"{name}-{_digest(_about(name, sweep, base.run, data.hash))}"
    return Plan(name, sweep, base, resources, space, data.folder, data.hash, folder, Path.cwd())


def _about(name: str, sweep: Sweep, run: Run, data_hash: str) -> dict[str, Any]:
    """The part of sweep.json that the sweep's id is made of."""
    return {
        "layout": LAYOUT,
        "format": FORMAT,
        "name": name,
        **{key: value for key, value in sweep.model_dump().items() if key in SAME},
        "run": differing(run),
        "data": data_hash,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def check_same(plan: Plan, new: bool) -> None:
    """Raises UserError if a sweep of that name was begun with other settings, unless `new` allows another one."""
    others = folders(plan.name)
    if others and plan.folder not in others and not new:
        raise UserError(_changed(plan, _about(plan.name, plan.sweep, plan.base.run, plan.data_hash), others[0]))


def begin(plan: Plan) -> None:
    """Create the folder, and write sweep.json with the current budget and the number of trials that it asks for.

    If this budget has been searched already, that stays noted there.
    """
    (plan.folder / "runs").mkdir(parents=True, exist_ok=True)
    about = _about(plan.name, plan.sweep, plan.base.run, plan.data_hash)
    beside = {"epochs": plan.base.run.epochs, "first": plan.id_of(plan.published), "budget": _budget(plan)}
    points = [plan.published, *spaces.grid(plan.space)] if plan.sweep.search == "grid" else []
    wanted = len({plan.id_of(point) for point in points}) or plan.sweep.trials
    before = read_about(plan.folder) if is_searched(plan) else {"wanted": wanted}
    over = {key: before[key] for key in ("wanted", SEARCHED) if key in before}
    write_json(plan.folder / ABOUT, {**about, **beside, **over})


def searched(plan: Plan, trials: int) -> None:
    """Write down that the search is over with so many trials: points drawn twice are one, and the time may be up."""
    over = {"wanted": trials, SEARCHED: _to_search(plan)}
    write_json(plan.folder / ABOUT, {**read_about(plan.folder), **over})


def is_searched(plan: Plan) -> bool:
    """Whether the search of the current budget is over, though its best may not be confirmed."""
    return (plan.folder / ABOUT).exists() and read_about(plan.folder).get(SEARCHED) == _to_search(plan)


def _to_search(plan: Plan) -> dict[str, Any]:
    return {key: getattr(plan.sweep, key) for key in ("trials", "hours")}


def complete(plan: Plan) -> bool:
    """Whether there is a result for the current budget."""
    found = read_result(plan.folder)
    return found is not None and found["budget"] == _budget(plan)


def _budget(plan: Plan) -> dict[str, Any]:
    return {key: getattr(plan.sweep, key) for key in ("trials", "hours", "confirm_seeds")}


def _changed(plan: Plan, about: dict[str, Any], other: Path) -> str:
    before, prefix = read_about(other), f"sweep {plan.name}"
    theirs = check(Run, before["run"])[0]
    if before.get("layout") != LAYOUT or format_of(before) != FORMAT or theirs is None:
        return f"{prefix}: {other} was begun by another version of this program; use --new to start another"
    now, then = _flat(plan.base, plan.base.run, about), _flat(plan.base, theirs, before)
    names = [key for key in {**now, **then} if json.dumps(now.get(key)) != json.dumps(then.get(key))]
    verb = "differ" if len(names) > 1 else "differs"
    return (
        f"{prefix}: {', '.join(names)} {verb} from the sweep in {other}; "
        "change it back to resume that one, or use --new to start another"
    )


def _flat(base: Experiment, run: Run, about: dict[str, Any]) -> dict[str, Any]:
    """What makes it this sweep, by the key that a person would change."""
    space = about.get("space", {})
    plain = {key: about.get(key) for key in SAME if key != "space"} | {"the data": about.get("data")}
    return flatten(run.model_dump(), f"{base.name}.") | {f"space.{key}": value for key, value in space.items()} | plain


def folders(name: str | None = None) -> list[Path]:
    """Folders of the sweeps of that name, or of all sweeps; the last active one first."""
    found = [path.parent for path in SWEEPS.glob(f"*/{ABOUT}")]
    found = [path for path in found if name is None or path.name.rpartition("-")[0] == name]
    return sorted(found, key=lambda path: -_touched(path))


def _touched(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder / ABOUT, *folder.glob(f"runs/*/{METRICS}")])


def begin_trial(folder: Path, point: Point) -> None:
    """Write trial.json with the point and the time, unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NOTE).exists():
        write_json(folder / NOTE, {"point": point, "began": time.time(), "done": False, "error": None})


def end_trial(folder: Path, error: str | None = None) -> None:
    """Record in trial.json that a trial is done, or why it failed."""
    ended = {"done": error is None, "error": error}
    write_json(folder / NOTE, {**read_note(folder), **ended})


def drop_weights(folder: Path) -> None:
    """Delete the weights of all trials: only their metrics matter, and dozens of checkpoints would fill the disk."""
    for name in (LAST, BEST):
        for path in folder.glob(f"runs/*/{name}"):
            shutil.rmtree(path)


def read_trials(folder: Path) -> list[Trial]:
    """All trials with their rows so far: the base, then in the order in which they began.

    Raises UserError if a file is damaged.
    """
    sweep, found = read_about(folder), []
    for run in sorted(path.parent for path in folder.glob(f"runs/*/{NOTE}")):
        found.append((read_note(run), run, tuple(read_rows(run, without(run)))))
    found.sort(key=lambda one: (one[1].name != sweep.get("first"), one[0]["began"], one[1].name))
    start = 1 if found and found[0][1].name == sweep.get("first", found[0][1].name) else 2  # not 1 without the base
    return [
        Trial(number, about["point"], _state(about, run), about["error"], run, rows)
        for number, (about, run, rows) in enumerate(found, start)
    ]


def _state(about: dict[str, Any], run: Path) -> str:
    if about["error"]:
        return FAILED
    if about["done"]:
        return DONE
    return RUNNING if is_held(run) else PRUNED


def best_of(trials: list[Trial]) -> Trial | None:
    """The best finished trial, or else the best of those that got furthest; None if no trial finished an epoch."""
    fit = [trial for trial in trials if trial.rows and trial.state != FAILED]
    whole = [trial for trial in fit if trial.state == DONE]
    if whole:
        return max(whole, key=lambda trial: (trial.best or 0.0, -trial.number))
    return max(fit, key=lambda trial: trial.rank, default=None)


def best_run(folder: Path, result: dict[str, Any]) -> Run:
    """The best run of a result, including one of format 1."""
    content = {"format": format_of(result), "config": result["run"]}
    return read_run(content, folder / RESULT)


def compared(ours: list[float], base: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, of best and base and of their paired differences; of one seed no sd."""
    differences = [one - other for one, other in zip(ours, base)]

    def both(values: list[float]) -> dict[str, Any]:
        spread = statistics.stdev(values) if len(values) > 1 else None
        return {"values": values, "mean": statistics.fmean(values), "sd": spread}

    return {"best": both(ours), "base": both(base), "difference": both(differences)}


def best_name(plan: Plan) -> str:
    """The experiment's name under which the best is trained, and the default of `fer sweep apply`."""
    return f"{plan.name}_best"


def seeds(plan: Plan, best: Trial) -> list[int]:
    """Seeds for the confirmation, which the search did not use; none if the base itself is the best."""
    return [] if best.number == 1 else [plan.base.run.seed + 1 + i for i in range(plan.sweep.confirm_seeds)]


def conclude(
    plan: Plan, trials: list[Trial], confirmed: list[Path], diverged: Mapping[int, str] = {}
) -> dict[str, Any]:
    """Content of result.json.

    `confirmed`: folders of finished runs of best and base, alternating, a pair per seed; `diverged`: seeds that have no
    such pair, as the loss of one of the two was infinite or not a number, with what was said of it.
    """
    best = best_of(trials)
    assert best is not None
    summaries = [summary for folder in confirmed if (summary := read_summary(folder)) is not None]
    values = [summary["val"]["accuracy"] for summary in summaries]
    first = next((trial for trial in trials if trial.number == 1), None)
    return {
        "format": FORMAT,
        "sweep": plan.folder.name,
        "base": plan.base.name,
        "data": plan.base.data,
        "best_name": best_name(plan),
        "budget": _budget(plan),
        "trials": len(trials),
        "states": {state: sum(trial.state == state for trial in trials) for state in (DONE, PRUNED, FAILED)},
        "epochs": sum(trial.epoch for trial in trials),
        "epochs_of_all": len(trials) * plan.base.run.epochs,
        "minutes": sum(trial.seconds for trial in trials) / 60,
        "first": {
            "val_accuracy": first.best if first else None,
            "epoch": first.epoch if first else 0,
            "epochs": plan.base.run.epochs,
            "failed": first is not None and first.state == FAILED,
        },
        "best": {"number": best.number, "val_accuracy": best.best, "epoch": best.epoch, "point": best.point},
        "run": plan.run(best.point).model_dump(),
        "seeds": [seed for seed in seeds(plan, best) if seed not in diverged] if values else [],
        "diverged": [f"seed {seed}: {line}" for seed, line in diverged.items()],
        "runs": [folder.name for folder in confirmed],
        "confirmed": compared(values[::2], values[1::2]) if values else None,
    }


def write_table(plan: Plan, trials: list[Trial]) -> Path:
    """Write trials.csv, one line per trial."""
    path = plan.folder / "trials.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        keys = list(dict.fromkeys(key for trial in trials for key in trial.point))
        table.writerow(["trial", "state", "epochs", "val_accuracy", "minutes", *keys])
        for trial in trials:
            values = [trial.point.get(key) for key in keys]
            table.writerow([trial.number, trial.state, trial.epoch, trial.best, round(trial.seconds / 60, 2), *values])
    return path


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of the sweep's MLflow run."""
    values = {"final/best_val_accuracy": result["best"]["val_accuracy"], "final/epochs": result["epochs"]}
    for name, found in (result["confirmed"] or {}).items():
        values[f"final/{name}_mean"] = found["mean"]
        if found["sd"] is not None:
            values[f"final/{name}_sd"] = found["sd"]
    return values
