"""The benchmarks run on small sizes, and both sides compute the same; no time is asserted."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, DATA, NO_AUGMENT, ROOT, VGG, experiment, refusal, small_run, wait_for

from benchmarks import __main__ as bench
from benchmarks import encoded, pipeline, plan, reference, training, video
from benchmarks.measure import HEAD, Effort
from fer.batches import Feed
from fer.data.dataset import open_data
from fer.evaluate import metrics, predict_split
from fer.faces.detect import Face
from fer.faces.predict import frames
from fer.train import fit
from pipelines import experiments

DEVICE = torch.device("cpu")
LITTLE = Effort(seconds=0, rounds=1, large=16, small=32, epochs=3)


COLOUR = {"channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize(("changes", "flip"), [({}, 1.0), (COLOUR, 0.0)], ids=["grey", "rgb"])
def test_both_sides_make_the_same_batches(changes: dict[str, Any], flip: float) -> None:
    """The engine in its own order, the reference in that of its files."""
    run = small_run(input=changes, augment=NO_AUGMENT | {"flip": flip})
    with training.faces(run, train=32) as (data, pngs):
        ours = list(training.batches(run, CPU, data, DEVICE, augmented=True))
        plain = reference.PngFolder(pngs / "train", run.input, reference.same_work(run))
        theirs = [plain[index] for index in np.random.default_rng(run.seed).permutation(32)]
    images = torch.cat([inputs["pixel_values"] for inputs, _, _ in ours])
    torch.testing.assert_close(images, torch.stack([image for image, _ in theirs]), atol=1e-5, rtol=0)
    assert torch.cat([labels for _, labels, _ in ours]).tolist() == [label for _, label in theirs]


@pytest.mark.parametrize("loss", ["focal_pdls", "vote_cross_entropy"])
def test_both_sides_take_the_same_step_and_find_the_same_accuracy(loss: str) -> None:
    no_dropout = VGG | {"conv_dropout": 0.0, "dense_dropout": 0.0}
    run = small_run(model=no_dropout, loss={"name": loss}, optimizer={"name": "adam"}, clip_grad_norm=None)
    with training.faces(run, train=16, val=40) as (data, pngs):
        inputs, labels, targets = next(training.batches(run, CPU, data, DEVICE, augmented=False))
        ours, theirs, still = (training.Steps(run, data, DEVICE) for _ in range(3))
        ours.step(inputs, labels, targets)
        theirs.plain_step(inputs["pixel_values"], labels)
        split, model = data.split("val"), ours.model
        logits, _ = predict_split(model, Feed(model, run, CPU, split, data.classes, DEVICE))
        expected = reference.accuracy(model, reference.loader(pngs / "val", run, CPU, None, 0, train=False), DEVICE)
    for one, two in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(one, two)
    assert any((one != two).any() for one, two in zip(ours.model.parameters(), still.model.parameters()))
    found = metrics(torch.softmax(logits, 1), split.labels)["accuracy"]
    assert (found, 0 < found < 1) == (pytest.approx(expected), True)


MOBILE: dict[str, Any] = {
    "model": {"name": "classifier", "backbone": {"name": "mobilenet_v3_large", "weights": None, "width": 0.25}},
    "input": {"image_size": 32},
}
CASES: dict[str, Callable[[], object]] = {
    "input": lambda: training.input_path(small_run(), CPU, DEVICE, LITTLE, 16),
    "augmentation": lambda: training.augmentation(small_run(), DEVICE, LITTLE, 16),
    "step": lambda: training.train_step(small_run(), CPU, DEVICE, LITTLE, "x"),
    "operations": lambda: training.operations(small_run(), CPU, DEVICE, LITTLE, "x"),
    "depthwise": lambda: training.depthwise(small_run(**MOBILE), CPU, DEVICE, LITTLE, "x"),
    "recorded": lambda: training.recorded(small_run(batch_size=8), CPU, DEVICE, LITTLE, "x", 16),
    "evaluation": lambda: training.evaluation(small_run(), CPU, DEVICE, LITTLE, "x", 16),
    "epoch": lambda: training.epoch(small_run(epochs=2), CPU, DEVICE, LITTLE, "x", 16),
    "published": lambda: training.published(small_run(epochs=2), CPU, DEVICE, LITTLE, "x", 16),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case_gives_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ways", lambda way: [way(0)])  # no processes
    rows = list(CASES[name]())
    assert len(rows) == {"input": 3, "depthwise": 2}.get(name, 1)
    assert all(row.rate > 0 and row.plain > 0 for row in rows)
    assert {str(row).count("|") for row in rows} == {HEAD.splitlines()[0].count("|")}
    assert set(training.CASES) == set(CASES)


def test_encoded_images_are_read_beside_a_bare_loop(tmp_path: Path) -> None:
    """Without processes, as another test may have run a flow in this one: then forked ones end."""
    encoded.write_encoded(tmp_path, 24, train=32, val=8, test=8)
    run = small_run(input={"image_size": 24, "channels": 3})
    asked = CPU.model_copy(update={"readers": 0})
    data = open_data(tmp_path)
    rows = [*encoded.reading(data, 0, DEVICE, LITTLE), *encoded.steps(data, run, asked, DEVICE, LITTLE)]
    assert len(rows) == 2
    assert all(row.rate > 0 and row.plain > 0 for row in rows)


def test_settings_are_those_of_the_experiment_without_files_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the project's experiments, wherever the command is given
    run, _ = training.settings("swin_nr_fpdls", DEVICE, epochs=4)
    assert (run.input.image_size, run.augment.rotation, run.epochs, run.schedule.warmup_epochs) == (384, 45, 4, 0)
    assert run.model.backbones()["backbone"].weights is None
    assert Path.cwd() == tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(("words", "message"), [
    (["--device", "cuda"], "--device cuda: this machine has no usable GPU; leave it out or give cpu"),
    (["--only", "published"], "--only published: is measured on a GPU only"),
])  # fmt: skip
def test_what_needs_a_gpu_says_so(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_pipelines_cost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s and 3 s an epoch against 2 s and 2.5 s an epoch, 64 images each; the first command takes 5 s more."""
    seconds = {pipeline.FLOW: (10, 3), pipeline.BARE: (2, 2.5)}
    cores = []

    def run(code: str, folder: Path, name: str, **changes: Any) -> float:
        assert (folder / DATA / "splits" / "train.csv").read_text().count("\n") == 1 + 64
        fixed, epoch = seconds[code]
        ends = [1e9 + fixed + epoch * (number + 1) for number in range(changes["epochs"])]
        (folder / "data" / "runs" / "x").mkdir(parents=True)
        text = "".join(json.dumps({"time": end}) + "\n" for end in ends)
        (folder / "data" / "runs" / "x" / "metrics.jsonl").write_text(text)
        cores.append(changes["resources.cpus_per_worker"])
        fresh = 0 if (folder / "stores").exists() else 5
        (folder / "stores").touch()
        return fixed + fresh + changes["epochs"] * epoch

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = list(pipeline.overhead(DEVICE, LITTLE))
    for row in found:
        assert row.note == "+8.0 s a command (+13.0 s the first of a project), +20.0 % an epoch of 2.5 s"
        assert (row.rate, row.plain) == pytest.approx((64 / 3, 64 / 2.5))
    assert len(found) == 2
    assert cores == [1] * (1 + 2 * LITTLE.rounds) + [3] * (1 + 2 * LITTLE.rounds)


@pytest.mark.soak
@pytest.mark.parametrize("code", [pipeline.FLOW, pipeline.BARE], ids=["flow", "bare"])
def test_both_ways_train_and_evaluate(code: str) -> None:
    with pipeline.project(64) as folder:
        changes = {"epochs": 1, "schedule.warmup_epochs": 0, "resources.device": "cpu"}
        assert pipeline.run(code, folder, pipeline.NAME, **changes) > 0
        (summary,) = (folder / "data" / "runs").glob("*/summary.json")
        assert json.loads(summary.read_text())["epochs"] == 1


def test_the_video_shows_where_its_faces_are_and_what_was_found_is_counted(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    left, other = (video.Drawn(Face(place, 0, 100, 100, 1), 2) for place in (0, 300))
    found = {0: [video.Seen(Face(5, 5, 95, 95, 1), 2, 1), video.Seen(Face(200, 0, 50, 50, 1), 2, 2)], 1: []}
    said = video.quality(found, [[left, other], [left]])
    assert said.startswith("33.3 % of 3 faces in 2 frames found, 1 boxes beside them; right of those found: 100.0 %")
    assert said.endswith("smoothed over 0.5 s: 0.0 %")
    run = fit("x", small_run(epochs=1), CPU, bars, tmp_path)
    keep = tmp_path / "clip.mp4"
    words = ["--data", str(bars), "--seconds", "1", "--compare", "1", "--rounds", "1", "--keep", str(keep)]
    monkeypatch.setattr("sys.argv", ["video", str(run), *words])
    video.main()
    shown = capsys.readouterr().out.splitlines()
    assert " faces in 25 frames found" in shown[1]
    assert shown[-1].startswith("| video 640x480")
    truth = video.make(keep, np.full((1, 16, 16), 250, np.uint8), np.zeros(1, int), 1)
    for frame, there in zip(frames(keep), truth, strict=True):
        for drawn in there:
            box = drawn.face
            inside = np.asarray(frame.pixels)[int(box.top) + 5 :, int(box.left) + 5 :][: int(box.height) - 10]
            assert inside[:, : int(box.width) - 10].min() > 225


# A plan of runs

ONE_EXPERIMENT = "name one experiment, and what to change as key=value; nothing else of `fer train` works here"

PLAN = """# three runs and what they make together
one: small epochs=1 seed=1
two: small epochs=1 seed=2

both: ensemble --mirror @one @two
taught: small epochs=2 teacher=@both   # by the two
"""


def carried_out(text: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Status and lines of `python -m benchmarks.plan` for a plan of this text."""
    Path("mine.txt").write_text(text)
    said: list[str] = []
    monkeypatch.setattr(sys, "argv", ["plan", "mine.txt", *words])
    return plan.main(said.append), said


@pytest.fixture
def at_root(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, whose processes find this code."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    experiment(project, "small")
    return project


@pytest.mark.slow
def test_a_plan_is_carried_out_in_the_order_of_what_waits_for_what(
    at_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["resources.device=cpu", "--at-once", "2"]
    status, said = carried_out(PLAN, words, monkeypatch)
    assert (status, len(said)) == (0, 4), said
    titles, runs = zip(*(line.partition(",")[0].split(": ") for line in said))
    assert ({*titles[:2]}, titles[2:]) == ({"one", "two"}, ("both", "taught"))
    summaries = {run: json.loads((at_root / "data/runs" / run / "summary.json").read_text()) for run in runs}
    for line, run in zip(said, runs):
        assert f"val {100 * summaries[run]['val']['accuracy']:.2f}, test" in line
    config = json.loads((at_root / "data/runs" / runs[3] / "config.json").read_text())["config"]
    assert (config["teacher"], config["epochs"]) == (runs[2], 2)
    made = json.loads((at_root / "data/runs" / runs[2] / "config.json").read_text())
    assert sorted(made["starts_from"]) == sorted(runs[:2])
    assert carried_out(PLAN, words, monkeypatch)[0] == 0
    for run, summary in summaries.items():  # nothing was left to do
        again = json.loads((at_root / "data/runs" / run / "summary.json").read_text())
        assert (again["finished"], again["train_seconds"]) == (summary["finished"], summary["train_seconds"])


@pytest.mark.slow
def test_what_fails_or_is_cut_off_is_told_and_what_waits_for_it_does_not_start(
    at_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "bad: nosuch\nlong: small epochs=100000\nsame: small epochs=100000\nwaits: ensemble @bad\n"

    def stop() -> None:
        wait_for(lambda: (failed := Path("data/logs/plan-bad.txt")).exists() and "error" in failed.read_text())
        wait_for(lambda: list(Path("data/runs").glob("*/progress.json")))
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop, daemon=True).start()
    status, said = carried_out(text, [], monkeypatch)
    lines = dict(line.split(": ", 1) for line in said)
    assert lines["bad"].startswith("error: experiments/nosuch.yaml: no such experiment")
    assert lines["waits"] == "not started"
    ends = sorted(lines[title] for title in ("long", "same"))  # the one that did not come first waited for the lock
    assert ends[0] == "cut off; the same command goes on"
    assert re.match(r"small-s1111-\w+: stopped in epoch \d+ after .* run the same command to resume", ends[1])
    assert status == 1
    for wrong, told in (
        ("x small", "mine.txt:1: write it as `title: EXPERIMENT [key=value ...]`"),
        ("x: small\n\nx: small", "mine.txt:3: there is a line x already"),
        ("x: small teacher=@y\ny: small", "mine.txt:1: no line above is called y"),
        ("x: ensemble --mirorr small", "mine.txt:1: write it as `ensemble [--mirror] @one @other ...`"),
        ("x: epochs=3", f"mine.txt:1: {ONE_EXPERIMENT}"),
        ("x: small --folds 5", f"mine.txt:1: {ONE_EXPERIMENT}"),
    ):
        Path("mine.txt").write_text(wrong)
        assert refusal(plan.read, Path("mine.txt")) == told


@pytest.mark.parametrize("name", ["gpu", "levers"])
def test_our_plans_name_experiments_that_there_are(name: str, project: Path) -> None:
    for line in plan.read(ROOT / f"benchmarks/{name}.txt"):
        words = [word.replace("@", "x-") for word in line.words]
        assert words[0] == "ensemble" or experiments.load(words, {}), line.title
