"""The DVC pipeline, run as a user runs it: `dvc` as a process in a copy of the project with a small drawn data set."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import DATA, change, lines, unpacked
from PIL import Image
from ruamel.yaml import YAML

from fer.data.sample import write_sample

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STAGES = ["faces", "download", "upscale", "split"]
FOLDERS = {"faces": "faces", "download": "raw", "upscale": "upscaled", "split": "splits"}

needs_dvc = pytest.mark.skipif(not (BIN / "dvc").exists(), reason="dvc is not installed (extra `pipeline`)")
slow = pytest.mark.slow


def test_every_module_that_a_stage_imports_is_its_dependency() -> None:
    """The sample's code is its input."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert list(stages) == STAGES
    for name, stage in stages.items():
        own = f"pipelines/stages/{name}.py"
        deps = {dep for dep in stage["do"]["deps"] if dep.startswith(("fer/", "pipelines/"))}
        deps |= {"fer/data/sample.py"} if name == "download" else set()
        folders = [f"{dep}/" for dep in deps if (ROOT / dep).is_dir()]
        needed = {own, *_imports_of_fer(own)}
        inside = {file: folder.rstrip("/") for file in needed for folder in folders if file.startswith(folder)}
        assert deps == {inside.get(file, file) for file in needed}, name


def _imports_of_fer(module: str) -> set[str]:
    """Files of fer and of the stages that `module` imports, and those that they import.

    Errors and renaming change no byte.
    """
    found: set[str] = set()
    todo = [module]
    while todo:
        for node in ast.walk(ast.parse((ROOT / todo.pop()).read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(("fer.", "pipelines.stages")):
                continue
            base = node.module.replace(".", "/")
            files = [f"{base}.py"] if (ROOT / f"{base}.py").exists() else [f"{base}/{a.name}.py" for a in node.names]
            files = [file for file in files if (ROOT / file).exists()]
            new = set(files) - found - {"fer/errors.py", "fer/files.py"}
            found |= new
            todo += new
    return found


def test_every_setting_that_a_stage_reads_is_its_parameter() -> None:
    """Device and workers change no pixel; files and weights are dependencies."""
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert {key for stage in stages.values() for key in stage["foreach"].split()} == {"${data}"}
    read = {name: stage["do"]["params"] for name, stage in stages.items()}
    sections = {"faces": "data", "download": "data", "upscale": "super_resolution", "split": "split"}
    assert read == {name: [{"datasets/${key}.yaml": [key]}] for name, key in sections.items()}
    assert "${super_resolution.weights}" in stages["upscale"]["do"]["deps"]
    assert all("${item}" in stages[name]["do"]["deps"] for name in ("faces", "download"))


def environment(project: Path, **more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return inherited | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(project / ".dvc" / "tmp" / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def call(project: Path, *command: str, status: int = 0, **more: str) -> str:
    """Run a command in the project, check its exit status and return what it printed, both streams."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=project, env=environment(project, **more), start_new_session=True, **both)
    assert done.returncode == status, done.stdout
    return done.stdout


def repro(project: Path, *options: str) -> list[str]:
    """`dvc repro`; the stages that it ran, those of the sample without its name."""
    ran = re.findall(r"Running stage '([\w@]+)'", call(project, "dvc", "repro", *options))
    return [stage.removesuffix("@sample") for stage in ran]


def status(project: Path) -> dict[str, dict]:
    """What `dvc status` finds changed of what each stage of the sample reads."""
    found = json.loads(call(project, "dvc", "status", "--json"))
    return {name.removesuffix("@sample"): changes[0]["changed deps"] for name, changes in found.items()}


def commit(project: Path) -> None:
    call(project, "git", "add", "--all")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    call(project, "git", *identity, "commit", "--quiet", "--allow-empty", "--message", "test")


def outputs(project: Path) -> dict[str, bytes]:
    """Every file under data/ but the user's own, and what is in it."""
    files = [path for path in (project / "data").rglob("*") if path.is_file()]
    names = {str(path.relative_to(project / "data")): path for path in files}
    own = re.compile(r"(README.md|.gitignore|external/|weights/)|.*\.lock$")
    return {name: path.read_bytes() for name, path in sorted(names.items()) if not own.match(name)}


def set_params(project: Path, *overrides: str, file: str = "params.yaml") -> None:
    """Set keys of a file with settings, `key.path=value`."""
    yaml = YAML()
    tree = yaml.load(project / file)
    for override in overrides:
        path, value = override.split("=")
        *parents, last = path.split(".")
        table = tree
        for part in parents:
            table = table[part]
        table[last] = YAML(typ="safe").load(value)
    yaml.dump(tree, project / file)


def set_sample(project: Path, *overrides: str) -> None:
    set_params(project, *overrides, file="datasets/sample.yaml")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as git sees it, uncommitted files among it, with a data set of 400 drawn faces; nothing run yet."""
    project = tmp_path_factory.mktemp("fresh") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    set_sample(project, "data.sample.train=320", "data.sample.val=40", "data.sample.test=40")
    call(project, "git", "init", "--quiet")
    commit(project)
    return project


@pytest.fixture(scope="session")
def built(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fresh` after `dvc repro`."""
    project = tmp_path_factory.mktemp("built") / "project"
    shutil.copytree(fresh, project)
    assert repro(project) == STAGES
    return project


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` to change."""
    return Path(shutil.copytree(built, tmp_path / "project"))


@slow
@needs_dvc
def test_first_repro_leaves_the_lock_file_and_its_outputs_and_the_second_nothing(built: Path) -> None:
    assert call(built, "git", "status", "--short").split() == ["??", "dvc.lock"]
    plots = [f"plots/{name}" for name in ("class_balance.csv", "contact_sheet.png")]
    tables = [f"splits/{name}" for name in ("summary.json", "test.csv", "train.csv", "val.csv")]
    raw = ["faces/boxes.csv", "faces/faces.json", "raw/images.npy", "raw/labels.csv", "raw/source.json"]
    made = [*raw, *plots, *tables, "metrics.json", "upscaled/images.npy", "upscaled/upscale.json"]
    assert list(outputs(built)) == sorted(f"sets/sample/{name}" for name in made)
    assert repro(built) == []


@slow
@needs_dvc
def test_two_fresh_runs_write_the_same_bytes(fresh: Path, built: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(fresh, tmp_path / "again"))
    repro(again)
    assert outputs(again) == outputs(built)
    assert (again / "dvc.lock").read_bytes() == (built / "dvc.lock").read_bytes()


@slow
@needs_dvc
def test_a_change_reruns_what_it_concerns(project: Path) -> None:
    def remark(*files: str) -> None:
        for file in files:
            with open(project / file, "a") as changed:
                changed.write("\n# a remark that changes no output, so later stages have nothing to do\n")

    before, weights = outputs(project), "data/weights/super_resolution"
    remark("fer/data/labels.py")
    assert repro(project) == ["faces", "download", "split"]
    remark("fer/super_resolution/new.py", f"{weights}/DIC_HELEN.pth", "fer/data/sample.py")
    remark(f"{weights}/README.md", "data/external/new.csv")  # of no data set here
    set_params(project, "super_resolution.workers=2", "super_resolution.device=cpu", "tracking.experiment=other")
    own = {name: {"fer/data/sample.py": "modified"} for name in ("faces", "download")}
    assert status(project) == {**own, "upscale": {"fer/super_resolution": "modified", weights: "modified"}}
    set_params(project, "super_resolution.workers=1")  # two would start Ray
    assert repro(project) == ["faces", "download", "upscale"]
    assert outputs(project) == before
    sections = {"faces": "data", "download": "data", "upscale": "super_resolution", "split": "split"}
    set_sample(project, "super_resolution.method=bicubic", "super_resolution.scale=2", "data.sample.seed=7")
    set_sample(project, "split.drop_leaked_train=exact")
    assert status(project) == {name: {"datasets/sample.yaml": {key: "modified"}} for name, key in sections.items()}
    assert repro(project) == STAGES


@slow
@needs_dvc
def test_another_data_set_leaves_the_first_alone(project: Path) -> None:
    before = outputs(project)
    for label, name in enumerate(("happy", "sad")):
        for person in range(8):
            path = project / f"data/external/mine/{name}/P{person}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20), 100 * label + person, np.uint8)).save(path)
    shutil.copy(project / "datasets/folders.yaml", project / "datasets/mine.yaml")
    set_params(project, "data.mine=data/external/mine")
    assert repro(project) == [f"{name}@mine" for name in STAGES]
    both = outputs(project)
    assert {name: content for name, content in both.items() if not name.startswith("sets/mine/")} == before
    set_params(project, "split.val_share=0.2", file="datasets/mine.yaml")
    assert repro(project, "split@mine") == ["split@mine"]
    shown = json.loads(call(project, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert set(shown) == {"data/sets/mine/metrics.json", "data/sets/sample/metrics.json"}
    assert repro(project) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@slow
@needs_dvc
def test_votes_that_the_stage_downloads_are_no_change_but_others_are(project: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    (project / "data/external/ferplus").mkdir()
    write_sample(project / "data/external/ferplus", 320, 40, 40, 3)
    votes = project / "data/external/ferplus/fer2013new.csv"
    shutil.move(votes, folder)
    digest = hashlib.sha256((folder / "fer2013new.csv").read_bytes()).hexdigest()
    url = f"data.votes_url={address}/fer2013new.csv"
    set_params(project, "data.ferplus=data/external/ferplus")
    set_params(project, url, f"data.votes_sha256='{digest}'", file="datasets/ferplus.yaml")
    assert repro(project) == [f"{name}@ferplus" for name in STAGES]
    assert len(list(project.glob("data/sets/*/plots/contact_sheet.png"))) == 1
    assert repro(project) == []
    header, first, *rest = votes.read_text().splitlines(keepends=True)
    usage, name, *_ = first.split(",")
    votes.write_text("".join([header, f"{usage},{name},0,0,0,0,0,0,0,10,0,0\n", *rest]))
    assert repro(project) == ["faces@ferplus", "download@ferplus", "split@ferplus"]
    assert repro(project) == []


@slow
@needs_dvc
def test_a_clone_pulls_and_needs_no_source_files(project: Path, tmp_path: Path) -> None:
    """The input is one file, outside of the project."""
    source = tmp_path / "elsewhere"
    source.mkdir()
    write_sample(source, 320, 40, 40, 3)
    call(project, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))

    def clone(name: str) -> Path:
        call(project, "dvc", "push")
        commit(project)
        call(project, "git", "clone", "--quiet", ".", str(tmp_path / name))
        call(tmp_path / name, "dvc", "pull")
        assert outputs(tmp_path / name) == outputs(project)
        return tmp_path / name

    assert "up to date" in call(clone("sample"), "dvc", "status")
    set_params(project, f"data.ferplus={source / 'fer2013.csv'}")
    assert repro(project) == [f"{name}@ferplus" for name in STAGES]
    assert repro(project) == []
    ferplus = clone("ferplus")
    shutil.rmtree(source)
    assert repro(ferplus, "--allow-missing") == []
    set_params(ferplus, "split.drop_leaked_train=exact", file="datasets/ferplus.yaml")
    assert repro(ferplus, "--allow-missing") == ["split@ferplus"]


# Kills DVC and the stage together, as losing the machine would, when a file is opened to be written that many times.
KILLER = """
import os, signal, sys

left = {times}

def hook(event, arguments):
    global left
    if event == "open" and str(arguments[0]).endswith("{file}") and set(str(arguments[1])) & set("w+"):
        left -= 1
        if not left:
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(hook)
"""


@pytest.fixture(scope="session")
def larger(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A fresh project whose super-resolution takes long enough to be killed in its middle, and its right outputs."""
    project = tmp_path_factory.mktemp("larger") / "project"
    shutil.copytree(fresh, project)
    set_sample(project, "super_resolution.method=lanczos", "super_resolution.scale=4")
    whole = Path(shutil.copytree(project, project.parent / "whole"))
    repro(whole)
    return project, outputs(whole)


@slow
@needs_dvc
@pytest.mark.parametrize(
    ("stage", "file", "times"),
    [
        ("download", "labels.csv", 1),
        ("upscale", "images.npy", 3),
        ("split", "summary.json", 1),
    ],
)
@pytest.mark.soak
def test_kill_in_the_middle_then_repro_finishes(
    larger: tuple[Path, dict[str, bytes]], tmp_path: Path, stage: str, file: str, times: int
) -> None:
    """images.npy of upscale is opened to make room, then for each of two shards."""
    fresh, expected = larger
    project = Path(shutil.copytree(fresh, tmp_path / "project"))
    unfinished = project / DATA / f"{FOLDERS[stage]}.partial"
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(KILLER.format(file=f"{unfinished.name}/{file}", times=times))
    call(project, "dvc", "repro", status=-9, PYTHONPATH=str(hook))
    assert unfinished.is_dir()
    assert not (project / DATA / FOLDERS[stage]).exists()
    written = np.load(unfinished / file, mmap_mode="r").any((1, 2)) if times == 3 else []
    assert sum(written) == (256 if times == 3 else 0)  # one shard

    assert repro(project) == STAGES[STAGES.index(stage) :]
    assert outputs(project) == expected
    assert not list(project.glob(f"{DATA}/*.partial"))


@slow
@needs_dvc
def test_metrics_and_plots_are_shown(project: Path) -> None:
    set_sample(project, "super_resolution.method=lanczos", "super_resolution.scale=2")
    assert repro(project) == ["upscale", "split"]
    shown = json.loads(call(project, "dvc", "metrics", "show", "--json"))[""]["data"]
    metrics = shown[f"{DATA}/metrics.json"]["data"]
    counts = {name: len(pd.read_csv(project / DATA / f"splits/{name}.csv")) for name in ("train", "val", "test")}
    assert {key: metrics[key] for key in counts} == counts
    summary = json.loads((project / DATA / "splits/summary.json").read_text())
    assert metrics["leaked"] == {key: summary["duplicates"][key] for key in metrics["leaked"]}
    assert metrics["leaked"]["test_in_train"] > 0
    restored = metrics["restored"]
    assert sorted(restored) == ["bicubic", "lanczos"]
    for quality in restored.values():
        assert 20 < quality["psnr"] < 60
        assert 0.5 < quality["ssim"] < 1
    call(project, "dvc", "plots", "show")
    page = (project / "dvc_plots" / "index.html").read_text()
    assert '"split": "train", "class": "neutral"' in page
    pictures = [path.name for path in (project / "dvc_plots" / "static").iterdir()]
    assert pictures == ["workspace_data_sets_sample_plots_contact_sheet.png"]


@slow
@needs_dvc
def test_ferplus_is_built_and_a_changed_picture_noticed(fresh: Path, tmp_path: Path) -> None:
    """With the first 2,000 pictures of each folder; tests/test_ferplus.py reads them all."""
    files = unpacked(tmp_path / "ferplus", "--limit", "2000")
    change(files, "FER2013*/label.csv", lines(0, 2000))
    project = Path(shutil.copytree(fresh, tmp_path / "project"))
    set_params(project, f"data.ferplus={files}")
    assert repro(project, "split@ferplus") == [f"{name}@ferplus" for name in STAGES]
    repro(project)
    assert repro(project) == []
    shutil.copy(files / "FER2013Train/fer0000006.png", files / "FER2013Train/fer0000005.png")
    assert "modified" in call(project, "dvc", "status")
