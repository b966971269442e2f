"""Train the runs of a plan side by side, on one machine that has neither Prefect, Ray nor MLflow.

`python -m benchmarks.plan FILE [key=value ...]`: each line of the file is `title: words of fer train`, or `title:
ensemble [--mirror] @one @other ...`. `@title` stands for the id of the run of a line above, which is waited for. The
changes apply to every run that is trained. What `--minutes` cut off is resumed by the same command.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fer.ensemble import NAME, combine
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.run_folder import read_config, read_summary
from fer.signals import Stopped
from fer.train import fit
from pipelines import experiments, params
from pipelines.data_sets import folder_of, folder_of_run

RUNS, LOGS = Path("data/runs"), Path("data/logs")
SECONDS = 30  # that runs get to save their state in the end


@dataclass
class Line:
    """A run of the plan: its words, and what it has come to."""

    title: str
    words: list[str]
    process: subprocess.Popen | None = None
    began: float = 0.0
    run: str | None = None  # its id once it is finished
    ended: bool = False
    needs: list[str] = field(init=False)  # titles

    def __post_init__(self) -> None:
        self.needs = [word.partition("@")[2] for word in self.words if "@" in word]

    @property
    def log(self) -> Path:
        """What its process has to say."""
        return LOGS / f"plan-{self.title}.txt"


def read(path: Path) -> list[Line]:
    """The runs of a plan. Raises UserError with the number of the line that is wrong."""
    found: dict[str, Line] = {}
    for number, text in enumerate(params.read_text(path).splitlines(), 1):
        text = text.partition("#")[0].strip()
        if not text:
            continue
        title, colon, words = text.partition(": ")
        line = Line(title.strip(), words.split())
        lost = [name for name in line.needs if name not in found]
        fault = ""
        if not colon or not params.NAME.fullmatch(line.title) or not line.words:
            fault = "write it as `title: words of fer train`"
        elif line.title in found:
            fault = f"there is a line {line.title} already"
        elif lost:
            fault = f"no line above is called {lost[0]}"
        if fault:
            raise UserError(f"{path}:{number}: {fault}")
        found[line.title] = line
    return list(found.values())


def carry_out(plan: list[Line], changes: list[str], at_once: int, seconds: float) -> Iterator[Line]:
    """Yield each run as it ends; in the end, those that were cut off or failed, without an id."""
    until, known = time.monotonic() + seconds, {line.title: line for line in plan}
    LOGS.mkdir(parents=True, exist_ok=True)
    while not all(line.ended for line in plan) and time.monotonic() < until:
        for line in plan:
            at_work = sum(one.process is not None and not one.ended for one in plan)
            if line.process is None and not line.ended:
                waits = [known[title] for title in line.needs]
                if any(one.ended and one.run is None for one in waits):
                    line.ended = True
                    yield line
                elif at_work < at_once and all(one.run for one in waits):
                    _begin(line, known, changes)
            elif line.process is not None and not line.ended and line.process.poll() is not None:
                _end(line)
                yield line
        time.sleep(0.1)
    cut = [line for line in plan if not line.ended]
    for line in cut:
        if line.process is not None:
            line.process.terminate()
    for line in cut:
        if line.process is not None:
            line.process.wait(SECONDS)
            _end(line)
        yield line


def _begin(line: Line, known: dict[str, Line], changes: list[str]) -> None:
    words = [one.partition("@")[0] + str(known[title].run) if (title := one.partition("@")[2]) else one
             for one in line.words]  # fmt: skip
    words += [] if words[0] == NAME else changes
    line.began = time.monotonic()
    with open(line.log, "w") as log:
        command = [sys.executable, "-m", "benchmarks.plan", "--run", "--", *words]
        line.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def _end(line: Line) -> None:
    assert line.process is not None
    said, _ = line.process.communicate()
    line.run, line.ended = said.strip() or None, True


def train(words: list[str]) -> Path:
    """Train or resume the run that the words describe, as `fer train` would; returns its folder once evaluated."""
    machine = params.load()
    if words[0] == NAME:
        folders = [RUNS / word for word in words[1:] if not word.startswith("--")]
        data = folder_of_run(machine, read_config(folders[0])["data"])
        return combine(folders, data, machine.resources, "--mirror" in words)
    (name,), _ = experiments.split(words)
    one = experiments.taught(experiments.load(words, params.machine(machine))[experiments.path_of(name).stem], RUNS)
    data = folder_of(machine, one.data)
    folder = fit(one.name, one.run, one.resources, data, RUNS)
    evaluate(folder, data, one.resources)
    return folder


def _told(line: Line) -> str:
    """Its numbers, or how it ended."""
    summary = read_summary(RUNS / line.run) if line.run else None
    if summary is None:
        said = line.log.read_text().strip().splitlines() if line.process is not None else ["not started"]
        return f"{line.title}: {said[-1] if said else 'ended without a word'}"
    val, test = (100 * summary[split]["accuracy"] for split in ("val", "test"))
    took = time.monotonic() - line.began
    return f"{line.title}: {line.run}, val {val:.2f}, test {test:.2f}, in {took:.0f} s"


def main(say: Callable[[str], None] = print) -> int:
    """Carry out a plan, or, as one of its processes, a run. Status 1 if a run failed, 75 if one was cut off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="FILE [key=value ...]")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, default=8, help="runs that share the machine (default 8)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which what is left is cut off (default 60)")
    asked = parser.parse_args()
    try:
        if asked.run:
            say(train(asked.words).name)
            return 0
        plan = read(Path(asked.words[0]))
        for line in carry_out(plan, asked.words[1:], asked.at_once, 60 * asked.minutes):
            say(_told(line))
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 75
    except UserError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in error.lines))
        return 2
    return max([line.process.returncode if line.process else 1 for line in plan if line.run is None], default=0)


if __name__ == "__main__":
    sys.exit(main())
