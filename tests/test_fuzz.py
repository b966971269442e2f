"""Two thousand damaged files and odd arguments: every command ends by itself, in results or in lines for a person."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, DATA, copy_settings, experiment, make_data
from test_sweep_folder import concluded

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.run import run_id
from fer.train import fit
from pipelines import cli
from pipelines import experiments as recipes
from pipelines.experiments import Job
from pipelines.params import load, machine
from pipelines.sweeps import folder as sweeps
from pipelines.work import work

CASES, SEED, LIMIT = 2000, 14, 60.0  # LIMIT: seconds after which a command hangs
NOWHERE = {"RAY_ADDRESS": "127.0.0.1:9", "PREFECT_API_URL": "http://127.0.0.1:9/api"}  # `fer train` ends there
ODD: list[Any] = [
    None, True, -1, 0, 3, 99, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "a\nb", "\ud800",
    "é" * 300, "x" * 5000, "../../outside", "2", [], [[]], {}, {"a": 1}, ["a", "b", "c"], [1] * 8, {"name": "x"},
]  # fmt: skip
YAML = [
    "2001-99-99", "!!int x", "!!python/object:os.system {}", "&a [*a]", "1" * 5000, "[" * 50 + "]" * 50, "{", "'", "? ",
    ".nan", ".inf", "1e30", "0x" + "f" * 40, "~", "[a, {b: c}]", "yes", "|\n x", '"\\ud800"', '"a\\0b"', "<<: 3",
    "%YAML 9.9", "--- 1", "100000", "no.such", "2001-01-01 00:00:00",
]  # fmt: skip
WORDS = [
    "one", "doe", "tiny", "nope", "**", "/", "..", "../../outside", "", "a/b", "[a", "\udcff", "x" * 5000, "one.yaml",
    "params.yaml", "data", "/dev/null", "one-s1", "--all", "-x", "--new", "--as", "--help", "--mlflow-port", "-1",
    "99999999", "a\nb", "seed=", "=1", "a=b=c", "epochs=0",
]  # fmt: skip
KEYS = [
    "seed", "epochs", "batch_size", "model", "model.width", "optimizer.lr", "input.image_size", "loss", "resources",
    "resources.workers", "augment", "init_from", "base", "space", "space.optimizer.lr", "trials", "changes", "a.b.c",
    "..", "precision", "input.mean", "hours", "scheduler",
]  # fmt: skip
HEADS = ["train", "config", "models", "evaluate", "compare", "sweep", "sweep status", "sweep apply",
         "ui --prefect-port", "train one", "config one", "sweep tiny"]  # fmt: skip
OF_SWEEPS = ["sweep status", "sweep apply tiny", "sweep run tiny"]
COMMANDS = ["train one", "train one seed=2", "config one", "models one", "compare", "compare one-s1",
            "compare one-s1 one-s1", "evaluate one-s1", *OF_SWEEPS]  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a finished run, one that was cut after its first epoch (seed 2), and a finished sweep."""
    project = tmp_path / "base"
    project.mkdir()
    monkeypatch.chdir(project)
    copy_settings(project)
    make_data(project / DATA)
    run = experiment(project, "one", {"device": "cpu"}, seed=1)
    finished = fit("one", run, CPU, DATA, "data/runs")
    evaluate(finished, DATA, CPU)
    with pytest.raises(InterruptedError):
        fit("one", run.model_copy(update={"seed": 2}), CPU, DATA, "data/runs", _cut)
    plan, _ = concluded(["tiny"], {"loss.alpha": 0.6})
    trial = plan.job(plan.published).folder
    sweeps.begin_trial(trial, plan.published)
    shutil.copy(finished / "metrics.jsonl", trial)
    return project


def _cut(row: dict[str, Any]) -> None:
    raise InterruptedError


def work_on(words: list[str]) -> int:
    """What a worker of `fer train` does, without Ray; the exit status that the command would have."""
    try:
        found = recipes.load(words, machine(load()))["one"]
        folder = Path("data/runs") / run_id(found.name, found.run, open_data(DATA).hash)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    ended = work(Job(found.name, found.run, found.resources, DATA, folder), patience=0)
    sys.stderr.write(f"{ended.kind}: {ended.message}\n")
    return {"done": 0, "mistake": 2, "diverged": 2}.get(ended.kind, 1)


# How a file is damaged


def _bytes(draw: random.Random, path: Path) -> None:
    """Cut off, some of them others, all, or no file."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 3, 100])):
        if content:
            content[draw.randrange(min(len(content), draw.choice([200, 10**9])))] = draw.randrange(256)
    others = [b"", b"\0", b"\xff\xfe", b"<html>", b"null", b"[]", b"{}", b"NaN", b"[" * 9999, b"1" * 5000]
    path.write_bytes(draw.choice([content, content[: draw.randrange(len(content) + 1)], draw.choice(others)]))
    if draw.random() < 0.5:
        path.unlink()
        draw.choice([lambda: None, path.mkdir, lambda: path.symlink_to(path.name)])()


def _changed(draw: random.Random, tree: Any) -> Any:
    """A tree of JSON with one value replaced or removed."""
    if isinstance(tree, dict | list) and tree and draw.random() < 0.85:
        key = draw.choice(list(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        if draw.random() < 0.15:
            del tree[key]
        else:
            tree[key] = _changed(draw, tree[key])
        return tree
    return draw.choice(ODD)


def _line(draw: random.Random, path: Path) -> None:
    """One of a JSON lines, of a csv, or of a YAML file, with another value, or another key."""
    lines, separator = path.read_text().splitlines(), ":" if path.suffix == ".yaml" else ","
    place = draw.choice([number for number, line in enumerate(lines) if separator in line])
    fields, odd = lines[place].split(separator), draw.choice([*YAML, json.dumps(draw.choice(ODD))])
    fields[draw.randrange(len(fields))] = f" {odd}"
    others = [json.dumps(_changed(draw, json.loads(lines[place])))] if path.suffix == ".jsonl" else [odd]
    lines[place] = draw.choice([separator.join(fields), *others])
    path.write_text("\n".join(lines) + "\n")


def _tensors(draw: random.Random, path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content[draw.choice(list(content))] = draw.choice([*ODD, torch.zeros(3), {}, {"optimizer": {}}])
    torch.save(content if draw.random() < 0.9 else draw.choice(ODD), path)


OF_KIND: dict[str, Callable[[random.Random, Path], object]] = {
    ".json": lambda draw, path: path.write_text(json.dumps(_changed(draw, json.loads(path.read_text())))),
    ".jsonl": _line, ".yaml": _line, ".csv": _line, ".pt": _tensors,
}  # fmt: skip


# A case


def prepare(draw: random.Random, project: Path) -> list[str]:
    """Damage a file of the project, or think of odd arguments; returns the words of the command."""
    if draw.random() < 0.3:
        odd = [draw.choice(WORDS), f"{draw.choice(KEYS)}={draw.choice([*YAML, str(draw.choice(ODD))])}"]
        return [*draw.choice(HEADS).split(), *draw.choices(odd, k=draw.choice([1, 1, 2]))]
    path = draw.choice(sorted(path for path in project.rglob("*") if path.is_file() and path.suffix != ".txt"))
    draw.choice([_bytes, *[OF_KIND.get(path.suffix, _bytes)] * 3])(draw, path)
    inside = path.relative_to(project).parts
    if inside[:2] == ("data", "runs"):
        seed = "seed=2" if inside[2].startswith("one-s2") else "seed=1"
        if draw.random() < 0.3 and path.name != "summary.json":  # so that it is evaluated again
            (project / "data/runs" / inside[2] / "summary.json").unlink(missing_ok=True)
        words = [f"WORK one {seed}", "compare", "compare one-s1 one-s2", "evaluate one-s", f"evaluate {inside[2]}"]
        return draw.choice([*words, f"train one {seed}"]).split()
    return draw.choice(OF_SWEEPS if inside[:2] == ("data", "sweeps") else COMMANDS).split()


def outcome(project: Path, words: list[str]) -> tuple[int | str, str]:
    """Exit status, or "hangs", and what was written, of a command in a process of its own, forked from this one."""
    log = project / "output"
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            os.chdir(project)
            os.environ |= NOWHERE
            output = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
            sys.argv = ["fer", *words]
            status = work_on(words[1:]) if words[0] == "WORK" else cli.main() or 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001  it is what the test looks for
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        pid, how = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(how), log.read_text(errors="replace")
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs", log.read_text(errors="replace")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_whatever_is_damaged_a_command_ends_in_results_or_in_lines(base: Path, tmp_path: Path) -> None:
    import pipelines.flow  # noqa: F401  before the forks

    finds = []
    for number in range(CASES):
        draw, project = random.Random(f"{SEED}-{number}"), tmp_path / str(number)
        shutil.copytree(base, project)
        words = [word.replace("\0", "") for word in prepare(draw, project)]
        status, text = outcome(project, words)
        shutil.rmtree(project)
        if status not in (0, 2) or "Traceback" in text:
            finds.append(f"case {number}: {words}: {status}: {text[-1500:]}")
    assert finds == []
