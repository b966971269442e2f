"""`fer serve`: the answers of `Predictor` over HTTP, refusals in one line, and a champion that moves."""

import asyncio
import io
import re
import shutil
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from conftest import CLASSES, CPU, answers, free_port, make_data, small_run, start_fer, wait_for
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from PIL import Image
from test_faces import photograph

from fer.faces.detect import build_detector, crop
from fer.predict import Predictor
from fer.train import fit
from pipelines import answering, serving
from pipelines.answering import Batches, Model, Models

ADDRESS = "http://127.0.0.1"
JPEG = {"Content-Type": "image/jpeg"}
TWO = photograph({(40, 60): 160, (330, 150): 240})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on the same data."""
    place = tmp_path_factory.mktemp("runs")
    data = make_data(place / "data")
    first, second = (fit(name, small_run(epochs=epochs), CPU, data, place) for epochs, name in enumerate("xy", 1))
    return first, second


@pytest.fixture
def client(runs: tuple[Path, Path]) -> Iterator[TestClient]:
    models = Models(lambda: (runs[0], "1"), build_detector(), "cpu")
    with TestClient(serving.build_app(models), ADDRESS) as made:
        yield made


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def asked(client: TestClient, content: bytes, query: str = "") -> Any:
    answer = client.post(f"/faces{query}", content=content, headers=JPEG)
    assert answer.status_code == 200, answer.text
    return answer.json()


def table(found: Any) -> list[list[float]]:
    return [[face["probabilities"][name] for name in CLASSES] for face in found["faces"]]


def test_the_faces_of_a_picture_and_a_cropped_face_get_the_answers_of_the_predictor(
    client: TestClient, runs: tuple[Path, Path]
) -> None:
    predictor, detector = Predictor(runs[0], "cpu"), build_detector()
    found, boxes = asked(client, encoded(TWO)), detector(TWO)
    assert (found["model"], found["size"]) == (
        {"run": runs[0].name, "version": "1"},
        {"width": 640, "height": 480},
    )
    wanted = predictor.probabilities([crop(TWO, face, detector.margin) for face in boxes])
    np.testing.assert_allclose(table(found), wanted, atol=2e-6)
    assert [face["prediction"] for face in found["faces"]] == [CLASSES[row.argmax()] for row in wanted]
    assert [face["box"]["left"] for face in found["faces"]] == [round(face.left, 2) for face in boxes]
    face = TWO[150:390, 330:570]
    found = asked(client, encoded(face), "?cropped=true")
    np.testing.assert_allclose(table(found), predictor.probabilities([face]), atol=2e-6)
    assert found["faces"][0]["box"] == {"left": 0, "top": 0, "width": 240, "height": 240}
    assert asked(client, encoded(np.full((90, 90), 9, np.uint8)))["faces"] == []


def test_pictures_as_people_have_them(client: TestClient) -> None:
    """Turned by EXIF, CMYK, grey, transparent, moving: the same faces as in the plain picture."""
    plain = asked(client, encoded(TWO))
    turned = Image.Exif()
    turned[0x112] = 6
    frames = [Image.fromarray(np.zeros_like(TWO))]
    for content in (
        encoded(np.rot90(TWO).copy(), "JPEG", exif=turned, quality=95),
        encoded(TWO, "JPEG", "CMYK", quality=95),
        encoded(TWO, "PNG", "L"),
        encoded(TWO, "PNG", "RGBA"),
        encoded(TWO, "WEBP", quality=95),
        encoded(TWO, "GIF", save_all=True, append_images=frames),
    ):
        found = asked(client, content)
        assert found["size"] == plain["size"]
        boxes = [list(face["box"].values()) for face in found["faces"]]
        np.testing.assert_allclose(boxes, [list(face["box"].values()) for face in plain["faces"]], atol=8)
        np.testing.assert_allclose(table(found), table(plain), atol=0.1)


def huge() -> bytes:
    """A PNG of 100 megapixels in a few bytes, whose pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sums = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + sums

    size = (10_000).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + b"\x08\x02\0\0\0") + chunk(b"IEND", b"")


SMALL = encoded(TWO[:48, :48])
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no type": ({"headers": {}}, 415, "Content-Type: send the picture itself, as image/jpeg or "),
    "a form": ({"files": {"file": SMALL}, "headers": {}}, 415, "Content-Type: send the picture itself"),
    "JSON with an address": ({"content": b'{"url": "file:///etc/passwd"}'}, 422, "picture: not a readable picture (no"),
    "nothing": ({"content": b""}, 422, "picture: not a readable picture (none of JPEG, PNG, WEBP, GIF)"),
    "EPS": ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 422, "picture: not a readable picture"),
    "damaged": (
        {"content": encoded(TWO[:200, :200], "JPEG")[:1500]},
        422,
        "picture: not a readable picture (image file is trunc",
    ),
    "16 bits": ({"content": encoded(np.zeros((9, 9), np.uint16))}, 422, "picture: has more than 8 bits per pixel"),
    "megapixels": ({"content": encoded(np.zeros((300, 300), np.uint8))}, 422, "picture: 300x300 pixels; at most 70,0"),
    "100 megapixels": ({"content": huge()}, 422, "picture: "),
    "bytes": ({"content": b"\xff" * 9001}, 413, "the picture has more than 9,000 bytes: shrink it"),
    "bytes unsaid": ({"content": iter([b"\xff" * 5000] * 3)}, 413, "the picture has more than 9,000 bytes"),
    "no face": ({"content": encoded(TWO[:20, :60]), "params": {"cropped": 1}}, 422, "images: 60x20 pixels, but the mo"),
    "no yes or no": ({"params": {"cropped": "perhaps"}}, 422, "cropped: Input should be a valid boolean"),
    "another page": ({"headers": JPEG | {"Host": "evil.example"}}, 421, "Host: send 127.0.0.1 or localhost"),
    "no host": ({"headers": JPEG | {"Host": "["}}, 421, "Host: send 127.0.0.1 or localhost"),
    "another path": ({"url": "/../etc/passwd"}, 404, "Not Found"),
    "another method": ({"method": "PUT"}, 405, "Method Not Allowed"),
}


@pytest.mark.parametrize(("how", "status", "line"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_a_line_of_json(
    how: dict[str, Any], status: int, line: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "BYTES", 9000)
    monkeypatch.setattr(serving, "PIXELS", 70_000)
    whole = {"method": "POST", "url": "/faces", "headers": JPEG} | ({} if "files" in how else {"content": SMALL}) | how
    answer = client.request(**whole)
    told = answer.json()["error"]
    assert (answer.status_code, told[: len(line)], len(told.splitlines())) == (status, line, 1)
    assert asked(client, SMALL)["faces"] == []  # it goes on


def test_a_picture_that_does_not_arrive_is_given_up(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SLOWEST", 0)
    answer = client.post("/faces", content=SMALL, headers=JPEG)
    assert (answer.status_code, answer.json()["error"]) == (408, "the picture did not arrive within 0 seconds")


def test_more_requests_than_are_taken_at_a_time_are_told_to_come_back(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "REQUESTS", 0)
    answer = client.post("/faces", content=SMALL, headers=JPEG)
    assert (answer.status_code, answer.headers["retry-after"], "try again" in answer.text) == (503, "1", True)


def test_an_error_of_the_code_is_one_line_too(runs: tuple[Path, Path]) -> None:
    models = Models(lambda: (runs[0], None), build_detector(), "cpu")
    models.now.predictor.model = None
    with TestClient(serving.build_app(models), ADDRESS, raise_server_exceptions=False) as client:
        for _ in range(2):
            answer = client.post("/faces", content=encoded(TWO), headers=JPEG)
            assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log says why"})
        assert 'fer_requests_total{path="/faces",status="500"} 2.0' in client.get("/metrics").text


def test_what_is_measured(client: TestClient) -> None:
    asked(client, encoded(TWO))
    assert client.get("/nix/nothing").status_code == 404
    shown = client.get("/metrics")
    assert shown.headers["content-type"].startswith("text/plain; version=")
    for line in (
        'fer_requests_total{path="/faces",status="200"} 1.0',
        'fer_requests_total{path="other",status="404"} 1.0',
        'fer_request_seconds_count{path="/faces"} 1.0',
        "fer_pass_faces_sum 2.0",
        "fer_pass_faces_count 1.0",
    ):
        assert line in shown.text
    assert "process_resident_memory_bytes" in shown.text


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert (page.status_code, "http" in page.text) == (200, False)
    assert re.findall(r"(?:src|href)=[\"']?([^\"'> ]+)", page.text) == ["data:,"]
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(("together", "passes"), [(True, 2), (False, 6)])
def test_faces_of_several_requests_get_the_answers_that_each_gets_alone(
    together: bool, passes: int, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the champion moves between them: a pass is of one model."""
    monkeypatch.setattr(answering, "PATIENCE", 0.5)  # all are in the queue at once
    old, new = (Model(run, None, build_detector(), "cpu") for run in runs)
    faces = np.random.default_rng(0).integers(0, 256, (12, 16, 16), np.uint8)
    parts, sizes = [faces[:1], faces[1:4], faces[4:4], faces[4:6], faces[6:7], faces[7:10], faces[10:]], list[int]()
    asked_of = [old] * 4 + [new] * 3

    async def several() -> list[np.ndarray]:
        batches = Batches(together, sizes.append)
        working = asyncio.create_task(batches.work())

        async def one(model: Model, part: np.ndarray) -> np.ndarray:
            with batches.one_more():
                await asyncio.sleep(0)  # all are under way
                return await batches.answer(model, part)

        found = await asyncio.gather(*map(one, asked_of, parts))
        working.cancel()
        return found

    for model, part, answer in zip(asked_of, parts, asyncio.run(several())):
        np.testing.assert_allclose(answer, model.predictor.probabilities(part), atol=2e-6)
    assert (len(sizes), sum(sizes)) == (passes, 12)


def test_each_champion_is_evened_as_far_as_the_first(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fer.predict.training_images", lambda meta: [2**place for place in range(8)])
    champion = [runs[0]]
    models = Models(lambda: (champion[-1], None), build_detector(), "cpu", even=0.5)
    faces = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    for run in runs:
        champion.append(run)
        models.look()
        found = models.now.predictor.probabilities(faces)
        np.testing.assert_array_equal(found, Predictor(run, "cpu", even=0.5).probabilities(faces))
        assert (found != Predictor(run, "cpu").probabilities(faces)).all()


def test_the_champion_is_followed_and_one_that_does_not_load_leaves_the_old_one(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(runs[1], broken)
    (broken / "best/model.safetensors").write_bytes(b"")
    champion: list[tuple[Path, str]] = [(runs[0], "1")]
    models = Models(lambda: champion[-1], build_detector(), "cpu")
    with TestClient(serving.build_app(models), ADDRESS) as client:
        for folder, version, news, run in (
            (runs[0], "1", "", runs[0]),
            (runs[1], "2", f"{runs[1].name} answers", runs[1]),
            (broken, "3", f"{broken}/best/model.safetensors: not a whole safetensors file", runs[1]),
            (broken, "3", "", runs[1]),  # told once
            (runs[1], "2", f"{runs[1].name} answers", runs[1]),
            (runs[0], "4", f"{runs[0].name} answers", runs[0]),
            (runs[0], "5", f"{runs[0].name} answers", runs[0]),  # registered anew
        ):
            champion.append((folder, version))
            told = models.look()
            assert (told[: len(news)], bool(told), "\n" in told) == (news, bool(news), False)
            health, found = client.get("/health").json(), asked(client, encoded(TWO))
            assert health["model"] == found["model"]
            assert found["model"]["run"] == run.name
            assert bool(health["problem"]) == (folder == broken)
            wanted = asked_alone(run)
            np.testing.assert_allclose(table(found), wanted, atol=2e-6)
        champion.clear()  # an error of the store
        assert models.look() == "the champion: list index out of range; the one before goes on"


def asked_alone(run: Path) -> np.ndarray:
    detector = build_detector()
    return Predictor(run, "cpu").probabilities([crop(TWO, face, detector.margin) for face in detector(TWO)])


# The command


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "tracking.uri: sqlite:///"),
        (["--run", "nix"], "nix: no such run in data/runs; runs: none yet"),
        (["--yunet", "nix.onnx"], "nix.onnx: No such file or directory: give the file face_detection_yunet"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(words: list[str], line: str, project: Path, here: Callable) -> None:
    done = here("serve", "--port", str(free_port()), *words)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[: len(line) + 7]) == (2, 1, f"error: {line}")


def test_a_port_in_use_and_a_detector_that_is_missing_are_told(
    project: Path, here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = here("serve", "--port", port)
    line = f"error: --port {port}: Address already in use; stop what uses it or choose another\n"
    assert (done.returncode, done.stderr) == (2, line)
    monkeypatch.setitem(sys.modules, "cv2", None)
    done = here("serve", "--port", port)
    assert (done.returncode, done.stderr.startswith("error: OpenCV is not installed: pip install ")) == (2, True)


@pytest.mark.slow
def test_the_command_follows_the_registry_and_answers_what_is_under_way_at_ctrl_c(
    runs: tuple[Path, Path], project: Path, empty_store: Path
) -> None:
    store = f"sqlite:///{shutil.copy(empty_store, project / 'mlflow.db')}"
    registry = MlflowClient(store)
    registry.create_registered_model("fer-sample")
    for run in runs:
        shutil.copytree(run, project / "data/runs" / run.name)
        registry.create_model_version("fer-sample", str(run), tags={"fer.run_id": run.name})
    registry.set_registered_model_alias("fer-sample", "champion", "1")
    port = free_port()
    command = start_fer(project, "serve", "--port", str(port), "--device", "cpu")
    with httpx2.Client(base_url=f"{ADDRESS}:{port}") as client:
        wait_for(lambda: command.poll() is not None or answers(f"{ADDRESS}:{port}/health"))
        assert asked(client, encoded(TWO))["model"] == {"run": runs[0].name, "version": "1"}
        registry.set_registered_model_alias("fer-sample", "champion", "2")
        wait_for(lambda: asked(client, encoded(TWO))["model"]["version"] == "2")

        def slow() -> Iterator[bytes]:
            content = encoded(TWO)
            yield content[:1000]
            command.send_signal(signal.SIGINT)
            wait_for(lambda: not answers(f"{ADDRESS}:{port}/health"))  # it takes no more
            yield content[1000:]

        answer = client.post("/faces", content=slow(), headers=JPEG)
    np.testing.assert_allclose(table(answer.json()), asked_alone(runs[1]), atol=2e-6)
    assert answer.headers["connection"] == "close"
    assert (command.communicate()[1], command.returncode) == ("", 0)
