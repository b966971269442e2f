"""What is said before DVC starts, and what .dvcignore spares it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BIN, ROOT, copy_settings

from fer.data.found import LINKED
from fer.errors import UserError
from pipelines.stages.inputs import IGNORED, inputs

DVC = BIN / "dvc"


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces" / "happy").mkdir(parents=True)
    (tmp_path / "faces" / "happy" / "1.png").write_bytes(b"x")
    return tmp_path / "faces"


def check(path: str) -> None:
    """Check a project with class folders at `path`, besides the sample."""
    if not Path("params.yaml").exists():
        copy_settings(Path())
    text = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("sample: fer", f"folders: '{path}'\n  sample: fer"))
    inputs()


def refused(path: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        check(path)
    return list(caught.value.lines)


def bytes_name(folder: Path, name: bytes) -> None:
    with open(os.fsencode(folder) + b"/" + name, "w") as file:
        file.write("x")


def test_good_input_is_silent(faces: Path, capfd: pytest.CaptureFixture) -> None:
    (faces / "linked.png").symlink_to(faces / "happy/1.png")
    (faces / "happy/above").symlink_to(faces)  # which DVC and the readers leave out
    (faces / "._x").symlink_to("nowhere")  # left out by .dvcignore
    bytes_name(faces, b"\xfc.txt")  # so is this, within the project
    check("faces")
    check("faces/happy/1.png")
    assert capfd.readouterr() == ("", "")


def test_what_dvc_ignores_is_ignored() -> None:
    lines = (ROOT / ".dvcignore").read_text().splitlines()
    assert {name for name in IGNORED if name not in lines and f"{name}/" not in lines} == set()


def test_every_link_to_nothing_is_named(faces: Path) -> None:
    for number in range(4):
        (faces / f"old{number}").symlink_to("/somewhere/else")
    (faces / ".cache").mkdir()  # which DVC does not ignore
    (faces / ".cache" / "2.png").symlink_to("../sad/2.png")
    remedy = "is a link to nothing: delete it, or restore what it points to"
    assert refused("faces") == [f"faces/old0, faces/old1, faces/old2 and 2 more: {remedy}"]


def test_a_pipe_is_named_before_dvc_waits_for_it(faces: Path) -> None:
    os.mkfifo(faces / "happy/pipe")
    assert refused("faces") == [
        "faces/happy/pipe: is no file, such as a named pipe, for which DVC would wait: delete it"
    ]


def test_a_name_that_dvc_cannot_write_outside_of_the_project(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_name(faces, b"\xfc.txt")
    (faces.parent / "project").mkdir()
    monkeypatch.chdir(faces.parent / "project")
    remedy = "has a name that is not UTF-8, which DVC cannot write outside of the project: rename it"
    assert refused(str(faces)) == [f"{faces}/\\udcfc.txt: {remedy}"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no", "no: not found: correct the path under data in params.yaml"),
        ("~/faces", f"params.yaml: data: '~/faces': ~ is not expanded: write {Path('~/faces').expanduser()}"),
        *((path, f"params.yaml: data.folders: {path} holds the outputs as well: name a folder of its own, as "
           "data/external") for path in ("data", ".", "data/sets")),
    ],
)  # fmt: skip
def test_a_path_that_cannot_be_the_input(faces: Path, path: str, message: str) -> None:
    assert refused(path) == [message]


@pytest.mark.slow
@pytest.mark.skipif(not DVC.exists(), reason="dvc is not installed (extra `pipeline`)")
def test_dvc_does_not_see_what_the_stage_leaves_out(faces: Path) -> None:
    shutil.copy(ROOT / ".dvcignore", faces.parent)
    kept = ["fröhlich lachend (1).png", "笑.png", "📷.jpg", "a\u0301.png", "label.csv"]
    hidden = [".DS_Store", "._label.csv", "Thumbs.db", "desktop.ini", "__MACOSX/label.csv", ".ipynb_checkpoints/x.csv"]
    for name in (*kept, *hidden):
        (faces / name).parent.mkdir(exist_ok=True)
        (faces / name).write_text(name)
    bytes_name(faces, b"lies mich \xfc.txt")
    (faces.parent / "dvc.yaml").write_text("stages: {a: {cmd: touch out, deps: [faces], outs: [out]}}\n")
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(faces.parent / "site")}
    for command in (["init", "--no-scm", "--quiet"], ["repro", "--quiet"]):
        done = subprocess.run([DVC, *command], cwd=faces.parent, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert f"nfiles: {len(kept) + 1}" in (faces.parent / "dvc.lock").read_text()


def test_a_link_to_a_folder_in_which_dvc_would_see_no_change(faces: Path, tmp_path: Path) -> None:
    shutil.copytree(faces / "happy", tmp_path / "elsewhere")
    (faces / "glad").symlink_to(tmp_path / "elsewhere")
    assert refused("faces") == [f"faces/glad: {LINKED}"]
