"""Train the runs of a plan side by side, on one machine that has neither Prefect, Ray nor MLflow.

`python -m benchmarks.plan FILE [key=value ...]`: each line of the file is `title: EXPERIMENT [key=value ...]`, or
`title: ensemble [--mirror] @one @other ...`. `@title` stands for the id of the run of a line above, which is waited
for. The changes apply to every run that is trained. What `--minutes`, Ctrl-C or SIGTERM cut off is resumed by the same
command.
"""

import argparse
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fer.data.dataset import open_data
from fer.ensemble import NAME, combine
from fer.errors import UserError
from fer.run import run_id
from fer.run_folder import read_config, read_summary
from fer.signals import Stopped
from pipelines import experiments, params
from pipelines.data_sets import folder_of, folder_of_run
from pipelines.work import work

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
    cut: bool = False  # off, by the time or a signal
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
            fault = "write it as `title: EXPERIMENT [key=value ...]`"
        elif line.title in found:
            fault = f"there is a line {line.title} already"
        elif lost:
            fault = f"no line above is called {lost[0]}"
        else:
            fault = _fault(line.words)
        if fault:
            raise UserError(f"{path}:{number}: {fault}")
        found[line.title] = line
    return list(found.values())


def _fault(words: list[str]) -> str:
    """What is wrong with the words of a line; empty if nothing is."""
    options = {word for word in words if word.startswith("-")}
    if words[0] == NAME:
        fits = options <= {"--mirror"} and len(words) > 1 + len(options)
        return "" if fits else f"write it as `{NAME} [--mirror] @one @other ...`"
    if options or len(experiments.split(words)[0]) != 1:
        return "name one experiment, and what to change as key=value; nothing else of `fer train` works here"
    return ""


def carry_out(
    plan: list[Line], changes: list[str], at_once: int, seconds: float, asked: threading.Event
) -> Iterator[Line]:
    """Yield each run as it ends; in the end, those that were cut off or failed, without an id.

    `asked`: set, it ends the runs as the end of the time does.
    """
    until, known = time.monotonic() + seconds, {line.title: line for line in plan}
    LOGS.mkdir(parents=True, exist_ok=True)
    while not all(line.ended for line in plan) and time.monotonic() < until and not asked.is_set():
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
        line.cut = line.process is None or line.process.poll() is None
        if line.process is not None:
            line.process.terminate()
    last = time.monotonic() + SECONDS
    for line in cut:
        if line.process is not None:
            try:
                line.process.wait(max(0.0, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                line.process.kill()  # its last epoch is saved
            _end(line)
        yield line


def _begin(line: Line, known: dict[str, Line], changes: list[str]) -> None:
    words = [one.partition("@")[0] + str(known[title].run) if (title := one.partition("@")[2]) else one
             for one in line.words]  # fmt: skip
    words += [] if words[0] == NAME else changes
    line.began = time.monotonic()
    with open(line.log, "w") as log:
        command = [sys.executable, "-m", "benchmarks.plan", "--run", *words]
        line.process = subprocess.Popen(  # Ctrl-C is for this process alone, which ends the others
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )


def _end(line: Line) -> None:
    assert line.process is not None
    said, _ = line.process.communicate()
    line.run, line.ended = said.strip() or None, True


def train(words: list[str]) -> str:
    """Train or resume the run that the words describe, as `fer train` would; returns its id once evaluated.

    Before it the run that it starts from, if it has `init_from`. Raises Stopped if it was cut off.
    """
    machine = params.load()
    if words[0] == NAME:
        folders = [RUNS / word for word in words[1:] if word != "--mirror"]
        data = folder_of_run(machine, read_config(folders[0])["data"])
        return combine(folders, data, machine.resources, "--mirror" in words).name
    ids: dict[str, str] = {}
    for name, one in experiments.load(words, params.machine(machine)).items():
        one, data = experiments.taught(one, RUNS), folder_of(machine, one.data)
        start = ids[one.run.init_from] if one.run.init_from else None
        ids[name] = run_id(name, one.run, open_data(data).hash, start)
        # a line of the same run, or of another one that starts from it, waits
        job = experiments.Job(name, one.run, one.resources, data, RUNS / ids[name], start)
        ended = work(job, patience=math.inf)
        if ended.kind != "done":
            raise (Stopped if ended.kind in ("stopped", "terminated") else UserError)(ended.message)
    return ids[name]


def _told(line: Line) -> str:
    """Its numbers, or how it ended."""
    summary = read_summary(RUNS / line.run) if line.run else None
    if summary is None:
        said = line.log.read_text().strip().splitlines() if line.process is not None else ["not started"]
        nothing = "cut off; the same command goes on" if line.cut else "ended without a word"
        return f"{line.title}: {said[-1] if said else nothing}"
    val, test = (100 * summary[split]["accuracy"] for split in ("val", "test"))
    took = time.monotonic() - line.began
    return f"{line.title}: {line.run}, val {val:.2f}, test {test:.2f}, in {took:.0f} s"


def _run(words: list[str]) -> int:
    """A process of a plan: carry out one run and print its id."""
    try:
        sys.stdout.write(f"{train(words)}\n")
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 75
    return 0


def main(say: Callable[[str], None] = print) -> int:
    """Carry out a plan. Status 1 if a run failed, else 75 if one was cut off, 2 for a mistake in the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--at-once", type=int, default=8, help="runs that share the machine (default 8)")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which what is left is cut off (default 60)")
    try:
        if sys.argv[1:2] == ["--run"]:
            return _run(sys.argv[2:])
        given = parser.parse_intermixed_args()
        if given.at_once < 1:
            raise UserError(f"--at-once: {given.at_once} starts nothing; give 1 or more")
        if names := experiments.split(given.changes)[0]:
            raise UserError(f"{names[0]}: is no change; write it as key=value, for example optimizer.lr=3e-4")
        plan, asked = read(given.file), threading.Event()
        handlers = {each: signal.signal(each, lambda *_: asked.set()) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            for line in carry_out(plan, given.changes, given.at_once, 60 * given.minutes, asked):
                say(_told(line))
        finally:
            for each, before in handlers.items():
                signal.signal(each, before)
    except UserError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in error.lines))
        return 2
    lost = [line for line in plan if line.run is None]
    return 1 if any(not line.cut for line in lost) else 75 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
