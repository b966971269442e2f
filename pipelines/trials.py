"""A sweep on disk, the one truth about it: sweep.json, and for each trial a folder with trial.json and its runs.

data/sweeps/<name>-<8 hex of base, space, search and data>/trials/<number>/<run id>/; `fer.train` fills the last.
"""

import csv
import fcntl
import hashlib
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fer.errors import UserError
from fer.files import write_json
from fer.formats import format_of, read_run
from fer.resources import Resources
from fer.run import FORMAT, Run, run_id
from fer.settings import differing
from pipelines import space as spaces
from pipelines import sweep_settings
from pipelines.experiments import Experiment
from pipelines.space import Point, Space
from pipelines.sweep_settings import Sweep

SWEEPS = Path("data/sweeps")
RUNNING, DONE, PRUNED, FAILED = "running", "done", "pruned", "failed"  # of a trial; running: or to be run again
# what makes it another sweep; the budget may grow and the machine may change
SAME = ("base", "seed", "search", "scheduler", "grace_epochs", "reduction", "space")


@dataclass(frozen=True)
class Plan:
    """A sweep as its file has it now, and its folder."""

    name: str
    sweep: Sweep
    base: Experiment
    resources: Resources  # of a trial: one process
    space: Space
    data_hash: str
    folder: Path
    root: Path  # of the project

    def run(self, point: Point) -> Run:
        run, faults = spaces.changed(self.base.run, self.space, point)
        if run is None:
            raise ValueError(f"{point}: {faults[0]}")
        return run

    def id_of(self, point: Point) -> str:
        return run_id(self.base.name, self.run(point), self.data_hash)

    @property
    def published(self) -> Point:
        return spaces.published(self.base.run, self.space)


@dataclass(frozen=True)
class Trial:
    """One trial: what it was given, and how far it came."""

    number: int  # the first is 1, the base
    point: Point
    state: str
    error: str | None
    folder: Path
    rows: tuple[dict[str, Any], ...] = ()  # of metrics.jsonl

    @property
    def epoch(self) -> int:
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def best(self) -> float | None:
        return max((row["val_accuracy"] for row in self.rows), default=None)

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.rows)

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Order of merit: those that came further first, as those that were stopped were worse."""
        return self.state in (DONE, PRUNED, RUNNING), self.epoch, self.best or 0.0


def plan(words: list[str], machine: dict[str, Any], data_hash: str) -> Plan:
    """The sweep named in `words`, with the changes there. Raises UserError when there is none, or it cannot work."""
    name, sweep, base, space = sweep_settings.load(words, machine)
    device = base.resources.device if sweep.gpus_per_trial else "cpu"
    of_trial = {"workers": 1, "cpus_per_worker": sweep.cpus_per_trial, "gpus_per_worker": 1.0, "device": device}
    resources = Resources.model_validate(base.resources.model_dump() | of_trial)
    folder = SWEEPS / f"{name}-{_digest(_about(name, sweep, base.run, data_hash))}"
    return Plan(name, sweep, base, resources, space, data_hash, folder, Path.cwd())


def _about(name: str, sweep: Sweep, run: Run, data_hash: str) -> dict[str, Any]:
    """What stands in sweep.json and decides the sweep's id."""
    return {
        "format": FORMAT,
        "name": name,
        **{key: value for key, value in sweep.model_dump().items() if key in SAME},
        "run": differing(run),
        "data": data_hash,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def check_same(plan: Plan, new: bool) -> None:
    """Raises UserError where a sweep of that name was begun with other settings, unless a `new` one is wished."""
    others = folders(plan.name)
    if others and plan.folder not in others and not new:
        raise UserError(_changed(plan, _about(plan.name, plan.sweep, plan.base.run, plan.data_hash), others[0]))


def begin(plan: Plan) -> None:
    """Make the folder and sweep.json, with the budget as it is now."""
    (plan.folder / "trials").mkdir(parents=True, exist_ok=True)
    about = _about(plan.name, plan.sweep, plan.base.run, plan.data_hash)
    write_json(plan.folder / "sweep.json", {**about, "epochs": plan.base.run.epochs, "budget": _budget(plan)})


def read_about(folder: Path) -> dict[str, Any]:
    """sweep.json, also of format 1."""
    about = json.loads((folder / "sweep.json").read_text())
    return about if "epochs" in about else {**about, "epochs": about["run"]["epochs"]}


def complete(plan: Plan) -> bool:
    """Whether there is a result, and the budget has not changed since."""
    found = result(plan.folder)
    return found is not None and found["budget"] == _budget(plan)


def _budget(plan: Plan) -> dict[str, Any]:
    return {key: getattr(plan.sweep, key) for key in ("trials", "hours", "confirm_seeds")}


def _changed(plan: Plan, about: dict[str, Any], other: Path) -> str:
    before, prefix = read_about(other), f"sweep {plan.name}"
    if format_of(before) != FORMAT:
        begun = f"{other} was begun in format {format_of(before)} and cannot go on in format {FORMAT}"
        return f"{prefix}: {begun}; give --new to start another"
    names = []
    for key in about:
        if about[key] != before.get(key):
            inner = _of_runs(plan.base.run, before["run"]) if key == "run" else _differing(about[key], before.get(key))
            head = {"run": plan.base.name, "data": "the data"}.get(key, key)
            names += [f"{head}.{part}" if part else head for part in inner]
    verb = "differ" if len(names) > 1 else "differs"
    return (
        f"{prefix}: {', '.join(names)} {verb} from the sweep in {other}; "
        "change it back to go on with that one, or give --new to start another"
    )


def _of_runs(run: Run, before: dict[str, Any]) -> list[str]:
    """The dotted keys in which a run differs from that of a sweep.json."""
    return _differing(run.model_dump(), Run.model_validate(before).model_dump(), deep=True)


def _differing(one: Any, other: Any, deep: bool = False) -> list[str]:
    """The keys in which two tables differ, dotted where `deep`; [""] where one of them is none."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [""]
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if not deep:
        return keys
    below = [(key, part) for key in keys for part in _differing(one.get(key), other.get(key), deep)]
    return [f"{key}.{part}" if part else key for key, part in below]


def folders(name: str | None = None) -> list[Path]:
    """The sweeps of that name (all without), the one worked on last first."""
    found = [path.parent for path in SWEEPS.glob("*/sweep.json")]
    found = [path for path in found if name is None or path.name.rpartition("-")[0] == name]
    return sorted(found, key=lambda path: -_touched(path))


def _touched(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder / "sweep.json", *folder.glob("clock.json")])


def add_trial(folder: Path, number: int, point: Point) -> Trial:
    """A new trial, to be run."""
    target = folder / "trials" / f"{number:03d}"
    target.mkdir(parents=True, exist_ok=True)
    _write(target, number, point, RUNNING, None)
    return read_trial(target)


def set_state(trial: Trial, state: str, error: str | None = None) -> Trial:
    """The trial as it is now, in that state."""
    _write(trial.folder, trial.number, trial.point, state, error)
    return read_trial(trial.folder)


def drop_weights(trial: Trial) -> None:
    """An ended trial is there for its numbers: dozens of checkpoints would fill the disk."""
    for name in ("last", "best"):
        for path in trial.folder.glob(f"*/{name}"):
            shutil.rmtree(path)


def _write(folder: Path, number: int, point: Point, state: str, error: str | None) -> None:
    write_json(folder / "trial.json", {"number": number, "point": point, "state": state, "error": error})


def read_trials(folder: Path) -> list[Trial]:
    """All trials in order, each with what it has written so far."""
    return [read_trial(path.parent) for path in sorted((folder / "trials").glob("*/trial.json"))]


def read_trial(folder: Path) -> Trial:
    about = json.loads((folder / "trial.json").read_text())
    # the run that it works on: its only one, or the last that pbt made of it
    runs = sorted(folder.glob("*/point.json"), key=lambda path: path.stat().st_mtime_ns)
    now = read_point(runs[-1].parent) if runs else None
    rows = tuple(read_rows(runs[-1].parent)) if runs else ()
    return Trial(about["number"], now["point"] if now else about["point"], about["state"], about["error"], folder, rows)


def read_point(run_folder: Path) -> dict[str, Any] | None:
    """point.json: the point that is trained there, and whose checkpoint it started from; None when it is not there."""
    try:
        return json.loads((run_folder / "point.json").read_text())
    except FileNotFoundError:
        return None


def read_rows(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none before the first epoch's end."""
    try:
        return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def best_of(trials: list[Trial]) -> Trial | None:
    """The best of those that came furthest; None when no trial ended an epoch."""
    fit = [trial for trial in trials if trial.rows and trial.state != FAILED]
    whole = [trial for trial in fit if trial.state == DONE]
    if whole:
        return max(whole, key=lambda trial: (trial.best or 0.0, -trial.number))
    return max(fit, key=lambda trial: trial.rank, default=None)


def spent(folder: Path) -> float:
    """Seconds that the search took so far, over all starts."""
    try:
        return json.loads((folder / "clock.json").read_text())["seconds"]
    except FileNotFoundError:
        return 0.0


def running(folder: Path) -> bool:
    """Whether a process on this machine works on the sweep."""
    try:
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def result(folder: Path) -> dict[str, Any] | None:
    """result.json; None before the sweep's end."""
    try:
        return json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None


def best_run(folder: Path, result: dict[str, Any]) -> Run:
    """The best run of a result, also of format 1."""
    content = {"format": format_of(result), "config": result["run"]}
    return read_run(content, folder / "result.json")


def compared(ours: list[float], base: list[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of both, and of the differences of each seed's pair."""
    differences = [one - other for one, other in zip(ours, base)]

    def both(values: list[float]) -> dict[str, Any]:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"values": values, "mean": statistics.fmean(values), "sd": spread}

    return {"best": both(ours), "base": both(base), "difference": both(differences)}


def best_name(plan: Plan) -> str:
    """The name under which the best is trained, and written by `fer sweep apply` unless another is given."""
    return f"{plan.name}_best"


def seeds(plan: Plan, best: Trial) -> list[int]:
    """Seeds that the search did not use; none where the base itself is the best."""
    own = plan.id_of(best.point) == plan.id_of(plan.published)
    return [] if own else [plan.base.run.seed + 1 + i for i in range(plan.sweep.confirm_seeds)]


def conclude(plan: Plan, trials: list[Trial], confirmed: list[Path]) -> dict[str, Any]:
    """result.json. `confirmed`: folders of the finished runs of best and base, in turns, a pair for each seed."""
    best = best_of(trials)
    assert best is not None
    values = [json.loads((folder / "summary.json").read_text())["val"]["accuracy"] for folder in confirmed]
    return {
        "format": FORMAT,
        "sweep": plan.folder.name,
        "base": plan.base.name,
        "best_name": best_name(plan),
        "budget": _budget(plan),
        "trials": len(trials),
        "states": {state: sum(trial.state == state for trial in trials) for state in (DONE, PRUNED, FAILED, RUNNING)},
        "epochs": sum(trial.epoch for trial in trials),
        "epochs_of_all": len(trials) * plan.base.run.epochs,
        "minutes": spent(plan.folder) / 60,
        "first": {"val_accuracy": trials[0].best, "epoch": trials[0].epoch, "epochs": plan.base.run.epochs},
        "best": {"number": best.number, "val_accuracy": best.best, "epoch": best.epoch, "point": best.point},
        "run": plan.run(best.point).model_dump(),
        "seeds": seeds(plan, best) if values else [],
        "runs": [folder.name for folder in confirmed],
        "confirmed": compared(values[::2], values[1::2]) if values else None,
    }


def write_result(plan: Plan, result: dict[str, Any]) -> Path:
    """Last of all: with it the sweep is complete."""
    write_json(plan.folder / "result.json", result)
    return plan.folder / "result.json"


def write_table(plan: Plan, trials: list[Trial]) -> Path:
    """trials.csv, a line for each trial."""
    path = plan.folder / "trials.csv"
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", "state", "epochs", "val_accuracy", "minutes", *plan.space])
        for trial in trials:
            values = [trial.point[key] for key in plan.space]
            table.writerow([trial.number, trial.state, trial.epoch, trial.best, round(trial.seconds / 60, 2), *values])
    return path


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of the sweep's own run in MLflow."""
    values = {"final/best_val_accuracy": result["best"]["val_accuracy"], "final/epochs": result["epochs"]}
    for name, found in (result["confirmed"] or {}).items():
        values |= {f"final/{name}_mean": found["mean"], f"final/{name}_sd": found["sd"]}
    return values
