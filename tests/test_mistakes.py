"""What people and disks do wrong, as the command line meets it: one line, exit status 2. The fuzz finds more."""

import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CPU, DATA, ROOT, experiment, free_port, refusal
from PIL import Image

from fer.data.found import look
from fer.data.readers.folders import read_named
from fer.data.source import Wanted
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.train import fit

Here = Callable[..., subprocess.CompletedProcess]
LONG = "x" * 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "**"], "**: no such run in data/runs; runs: none yet"),
        (["evaluate", "../../outside"], "../../outside: no such run in data/runs"),
        (["compare", "../../outside"], "../../outside: no finished run in data/runs"),
        (["compare", ""], "an empty name: no finished run in data/runs; finished: none yet"),
        (["evaluate", ""], "an empty name: no such run in data/runs; runs: none yet"),
        (["registry", "--dataset", "a/b"], "--dataset a/b: should be the name of a data set, as sample"),
        (["predict", ".", "--out", "nix/p.csv"], "--out nix/p.csv: name a file in a folder that exists"),
        (["predict", ".", "--out", "/dev/x.txt"], "--out /dev/x.txt: name a file that ends in .csv or .parquet"),
        (["predict", "/dev/zero"], "/dev/zero: no regular file; give pictures"),
        (["registry"], "tracking.uri: sqlite:///"),
        (["export", "champion"], "tracking.uri: sqlite:///"),  # which is asked who that is
        (["explain", "champion", "--out", "maps"], "tracking.uri: sqlite:///"),
        (["compare", "x", "--report", "params.yaml"], "--report params.yaml: name a file that ends in .html or .htm"),
        (["compare", "x", "--report", "experiments"], "--report experiments: name a file that ends in .html"),
        (["train", "--sed", "3"], "fer train: No such option: --sed (`fer train --help`)\n"),
        (["evaluate"], "fer evaluate: Missing argument 'run' (`fer evaluate --help`)\n"),
        (["evalute"], "fer: No such command 'evalute'. Did you mean 'evaluate'? (`fer --help`)\n"),
        (["export", "x", "--to", "y"], "fer export: Invalid value for '--to': Value error, 'y' is not one of 'folder'"),
        (["ui", "--prefect-port", "0"], "fer ui: Invalid value for '--prefect-port': Input should be greater than or"),
        (["config", LONG], f"experiments/{LONG}.yaml: no such experiment"),
        (["sweep", LONG], f"sweeps/{LONG}.yaml: no such sweep"),
        (["train", "doe", "--folds", "1"], "folds 1: should be 2 or more, or `subjects` to leave one subject out"),
        (["config", "doe", "seed=2001-99-99"], "seed=2001-99-99: the value is not valid YAML"),
        (["config", "doe", "seed=5000000000"], "command line: seed: should be less than 4294967296, got 5000000000"),
        (["config", "doe", "input.image_size=100000"], "command line: input.image_size: should be less than or equal"),
        (["config", "vgg13_small", "model.width=1e6"], "command line: model.width: should be less than or equal to 16"),
    ],
)
def test_a_mistake_on_the_command_line(words: list[str], message: str, project: Path, here: Here) -> None:
    done = here(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_broken_experiment_hides_no_other_model(project: Path, here: Here) -> None:
    broken = Path("experiments/broken.yaml")
    broken.write_text("# A mistake.\nmodel: vgg13\nepoch: 3\n")
    done = here("models")
    broken.unlink()
    assert (done.returncode, "small_resnet_nr" in done.stdout, "vgg13_small" in done.stdout) == (2, True, True)
    assert done.stderr == "error: experiments/broken.yaml: epoch: unknown key, did you mean 'epochs'?\n"


def test_brackets_in_names_are_shown(project: Path, here: Here) -> None:
    Path("[old] x").mkdir()
    shutil.copy("experiments/vgg13_small.yaml", "[old] x/mine.yaml")
    done = here("config", "[old] x/mine.yaml")
    assert (done.returncode, "[old] x" in done.stdout) == (0, True)


def test_help_is_shown_where_a_command_is_missing(here: Here) -> None:
    done = here("sweep")
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage: fer sweep [OPTIONS] COMMAND" in done.stdout


def test_a_port_that_is_taken_and_the_version(here: Here) -> None:
    port = str(free_port())
    done = here("ui", "--mlflow-port", port, "--prefect-port", port)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --prefect-port {port}: another server has it; choose another\n",
    )
    done = here("--version")
    assert (done.returncode, done.stdout.split(".")[0]) == (0, "fer 0")


def test_the_other_package_named_fer_beside_ours(tmp_path: Path) -> None:
    about = tmp_path / "fer-25.10.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fer\nVersion: 25.10.3\n")
    (tmp_path / "fer").mkdir()
    (tmp_path / "fer/__init__.py").touch()  # it is found first
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli import main; main()"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: the package fer 25.10.3 is installed beside fer-pipeline")


def test_an_installation_without_the_pipeline(tmp_path: Path) -> None:
    """What `pip install -e .` alone leaves."""
    code = "import sys; sys.modules['typer'] = None; from pipelines.cli import main; main()"
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: typer is missing: `make install`")


def test_one_damaged_run_leaves_the_others_to_be_compared(project: Path, here: Here) -> None:
    run = experiment(project, "one", {"device": "cpu"}, epochs=1)
    folder = fit("one", run, CPU, DATA, "data/runs")
    evaluate(folder, DATA, CPU)
    other = shutil.copytree(folder, folder.with_name("other-s1-00000000"))
    (project / "data/runs/notes.txt").touch()
    sums = Path("data/folds/one.folds3-s1-00000000")
    sums.mkdir(parents=True)
    for damaged, remedy in (
        (other, f"delete it and run `fer evaluate {other.name}`"),
        (sums, "delete it and run `fer t"),
    ):
        (damaged / "summary.json").write_text("{")
        done = here("compare")
        told = f"error: {damaged}/summary.json: not valid JSON; {remedy}"
        assert (done.returncode, folder.name in done.stdout, done.stderr[: len(told)]) == (2, True, told)
        assert damaged == sums or here("evaluate", "other").returncode == 2
        (damaged / "summary.json").unlink()
        assert here("compare").returncode == 0
    # without best/ the same command would find everything trained, and nothing to evaluate
    shutil.rmtree(folder / "best")
    (folder / "summary.json").unlink()
    done = here("evaluate", "one")
    best = f"data/runs/{folder.name}/best: no checkpoint there (checkpoint.json is missing)"
    told = f"error: {best}; delete data/runs/{folder.name} and train again\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_runs_evaluated_on_different_test_splits_stand_apart(project: Path, here: Here) -> None:
    run = experiment(project, "one", {"device": "cpu"}, epochs=1)
    folders = [fit(name, run, CPU, DATA, "data/runs") for name in ("one", "two")]
    for folder in folders:
        evaluate(folder, DATA, CPU)
    assert here("compare").stdout.count("data ") == 1
    path = project / DATA / "splits/test.csv"
    path.write_text(path.read_text().replace("136,136.png,0,", "136,136.png,1,"))
    evaluate(folders[0], DATA, CPU)
    assert here("compare").stdout.count("test split ") == 2
    assert here("ensemble", "one", "two").returncode == 0
    assert here("compare").stdout.count("test split ") == 0


def test_a_test_split_that_is_wrong_is_told_before_anything_starts(project: Path, here: Here) -> None:
    path = project / DATA / "splits/test.csv"
    path.write_text(path.read_text().replace("136,136.png,0,", "136,136.png,99,"))
    done = here("train", "vgg13_small")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {DATA}/splits/test.csv: label 99 is not in classes; make it again with")


def test_a_server_that_is_not_mlflows(tmp_path: Path) -> None:
    from pipelines.tracking import Tracker

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert refusal(Tracker, address, "fer").startswith(f"tracking.uri: {address}: ")
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("RAY_ADDRESS", address, "RAY_ADDRESS: ") for address in ("nonsense", "[::1:9", "http://127.0.0.1:9")),
        ("PATH", "", "PATH: Ray starts its workers by bash, which is not there"),
        ("RAY_TMPDIR", "/proc/nowhere", "RAY_TMPDIR: Ray cannot keep its files in /proc/nowhere "),
        ("RAY_TMPDIR", "DEEP", "RAY_TMPDIR: Ray cannot keep its files in .*; set it to a folder of your own"),
        ("ulimit", "-f", "ulimit -f: a file may have 20 MB, and Ray needs one of 128; raise"),
    ],
)
def test_what_ray_cannot_start_with(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of another user ends as one that cannot be made; for a socket's path 107 bytes are the limit."""
    from pipelines import launch

    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setenv(name, str(deep) if value == "DEEP" else value)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if name == "ulimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, before[1]))
    try:
        assert re.match(message, refusal(launch.start_ray))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_damaged_sweep_is_named(project: Path, here: Here) -> None:
    from pipelines.sweeps import folder as sweeps

    plan = sweeps.plan(["tiny"], {}, lambda base: SimpleNamespace(folder=DATA, hash="d" * 16))
    sweeps.begin(plan)
    sweeps.begin_trial(plan.job(plan.published).folder, plan.published)
    trial = plan.job(plan.published).folder / "trial.json"
    point = {**json.loads(trial.read_text()), "point": 3}
    for path, text, fault in [
        (trial, json.dumps(point), "point: should be a table of keys, got 3"),
        (plan.folder / "result.json", "{}", "sweep: missing"),
        (plan.folder / "sweep.json", "[]", "should be a table of keys, got []"),
    ]:
        before = path.read_text() if path.exists() else ""
        path.write_text(text)
        done = here("sweep", "status")
        assert done.returncode == 2
        assert f"{path.name}: {fault}; delete " in done.stderr
        path.write_text(before) if before else path.unlink()


def test_no_message_has_two_lines(tmp_path: Path) -> None:
    for place in ("train/glad\u2028x", "train/sadness"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (48, 48)).save(tmp_path / place / "1.png")
    (tmp_path / "test").mkdir()
    with look(tmp_path) as found:
        line = refusal(read_named, found, Wanted(), ["happiness", "sadness"])
    assert r"folder 'glad\u2028x' is none of happiness, sadness" in line
    (tmp_path / "train/glad\u2028x").rename(tmp_path / "train/\x1b[2Jhappy")
    with ExitStack() as stack:
        line = refusal(stack.enter_context, look(tmp_path))
    assert line.endswith(r"/train/\x1b[2Jhappy/1.png: its name has a control character: rename it")
    error = pickle.loads(pickle.dumps(UserError("a\nb", "c")))
    assert (error.lines, str(error)) == ((r"a\nb", "c"), "a\\nb\nc")
