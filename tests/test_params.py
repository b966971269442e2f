"""params.yaml: every mistake is one line with its dotted path, all at once; and no key is dead."""

import ast
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from fer.data.augment import Augment
from fer.errors import UserError
from fer.input import Input
from fer.losses import LOSSES
from fer.models import MODELS
from fer.models.backbones import BACKBONES
from fer.models.classifier import RESIZERS
from fer.models.embedding_difference import PAIRINGS
from fer.optimizer import OPTIMIZERS
from fer.resources import Resources
from fer.run import Run
from fer.schedule import SCHEDULES
from pipelines import data_sets
from pipelines.experiments import Recipe
from pipelines.params import (
    Params,
    Promotion,
    Tracking,
    Upscaling,
    load,
    machine,
    parse_value,
    read_yaml,
    yaml_of,
)
from pipelines.sweeps.settings import Sweep

SHIPPED = ROOT / "params.yaml"


def plain() -> dict[str, Any]:
    return read_yaml(SHIPPED, "")


def changed(**changes: Any) -> dict[str, Any]:
    """The shipped settings with other values at some dotted paths, whose dots are written as `__`."""
    tree = plain()
    for path, value in changes.items():
        *parents, last = path.split("__")
        table = tree
        for part in parents:
            table = table.setdefault(part, {})
        table[last] = value
    return tree


def read(folder: Path, tree: dict[str, Any]) -> Params:
    (folder / "params.yaml").write_text(yaml_of(tree))
    return load(folder / "params.yaml")


def mistakes(folder: Path, tree: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(folder, tree)
    prefix, lines = f"{folder}/params.yaml: ", str(caught.value).splitlines()
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


def test_the_shipped_file_loads(tmp_path: Path) -> None:
    params = load(SHIPPED)
    assert (params.chosen(None), params.chosen("sample")) == ("sample", "sample")
    assert params.data["sample"] == "fer/data/sample.py"  # which changes it
    # what it writes out are the defaults
    assert (params.resources, params.tracking.promotion) == (Resources(), Promotion())


@pytest.mark.parametrize("said", [{"device": "cpu", "workers": 1}, {}])
def test_what_the_machine_says_is_only_what_it_says(said: dict[str, Any], tmp_path: Path) -> None:
    """A default that is written out is said."""
    params = read(tmp_path, plain() | {"resources": said})
    assert (machine(params), params.resources) == (said, Resources.model_validate(said))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "data: names no data set: add NAME: FOLDER"),
        ({"data": {"a/b": "x"}}, "data: a data set's name is made of up to 100 letters, digits, _ and -, got 'a/b'"),
        ({"data": {7: "x"}},
         "data: a data set's name is made of up to 100 letters, digits, _ and -, got 7; write it in quotes"),
        ({"data__mine": None}, "data.mine: should be where its files are, a path, got None"),
        ({"data__mine": ""}, "data.mine: should be where its files are, a path, got ''"),
        ({"data": ["mine"]}, "data: should be a table of keys, got ['mine']"),
        ({"tracking": None}, "tracking: should be a table of keys, got None"),
        ({"super_resolution__scale": 2}, "super_resolution.scale: unknown key; known: device, weights, workers"),
        *(({"tracking__promotion__margin": value},
           f"tracking.promotion.margin: should be points from 0 to 100, or significant, got {value!r}")
          for value in (-1, "big", True)),
        ({"epochs": 3}, "epochs: unknown key; known: data, resources, super_resolution, tracking"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_once_where_it_stands(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert mistakes(tmp_path, changed(**changes)) == [message]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    tree = changed(resources__workers=0, zzz=1) | {1: "x"}
    del tree["tracking"], tree["super_resolution"]["weights"]
    tree["super_resolution"][7] = "x"
    assert [line.partition(": ")[0] for line in mistakes(tmp_path, tree)] == [
        "super_resolution.weights", "super_resolution.7", "resources.workers", "tracking", "zzz", "1",
    ]  # fmt: skip


# each list holds the one before eight times
BOMB = b"0: &0 [1]\n" + b"".join(b"%d: &%d [%s]\n" % (n + 1, n + 1, b", ".join([b"*%d" % n] * 8)) for n in range(6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", ": holds no keys; restore it with `git checkout {path}`"),
        (b"a: 1\nb: 2\na: 3\n", ': line 3 is not valid YAML: found duplicate key "a" with value "3"'),
        (b"a: !!python/object:os.system {}\n", ": line 1 is not valid YAML: could not determine a constructor"),
        (b"a: \xff\xfe", ": is not valid YAML: 'utf-8' codec"),
        (b"a: 2001-99-99\n", ": is not valid YAML: month must be in 1..12"),
        (b"a: !!bool x\n", ": is not valid YAML: 'x'"),
        (b"a: " + b"1" * 5000, ": is not valid YAML: Exceeds the limit (4300 digits)"),
        (b"a: 1" + b"0" * 30, ": holds a number of more than 64 bits"),
        (b"a: &b [*b]\n", ": is nested more than 30 levels deep, or refers to itself"),
        (b"a: " + b"[" * 1500 + b"]" * 1500, ": is nested more than 30 levels deep"),
        (BOMB, ": holds more than 100000 values"),
        (b'a: "\\ud800"\n', ": holds '\\ud800', which is no text"),
        ("a circle", ": cannot be read (Too many levels of symbolic links)"),
        (None, ": not found; run the command in the project's root folder"),
        ("mkdir", ": cannot be read (Is a directory)"),
        ("mkfifo", ": cannot be read (Not a regular file)"),
        ("ln -s /dev/zero", ": cannot be read (Not a regular file)"),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, text: bytes | str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text == "a circle":
        path.symlink_to(path)
    elif text:
        subprocess.run([*text.split(), path], check=True)
    with pytest.raises(UserError) as caught:
        load(path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}{message.format(path=path)}")


@pytest.mark.parametrize("name", ["a b", "a#b", "a%20b", "a\nb", "a$(b)", "\udce9"])
def test_a_project_whose_path_the_frameworks_misread_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load(SHIPPED)
    (line,) = caught.value.lines
    assert line.startswith(f"{str(tmp_path / name)!r}: Ray, MLflow and Prefect cannot work in a folder with ")
    assert line.isprintable()
    (tmp_path / "表情-é_1.2,a+b=c@d~f").mkdir()  # letters of all alphabets are fine
    monkeypatch.chdir(tmp_path / "表情-é_1.2,a+b=c@d~f")
    load(SHIPPED)


# Values on the command line, and written files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("3", 3), ("3.0", 3.0), ("null", None), ("", None), ("[3, 5]", [3, 5]), ("'3'", "3"),
        ("{name: sgd, lr: 1e-3}", {"name": "sgd", "lr": 1e-3}), ("true", True), ("yes", "yes"), ("a/b.pth", "a/b.pth"),
    ],
)  # fmt: skip
def test_a_value_is_read_as_yaml(text: str, value: object) -> None:
    found = parse_value(text, f"x={text}")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1", "is not valid YAML"),
        ("2001-99-99", "is not valid YAML"),
        ("&a [*a]", "is nested more than 30 levels deep, or refers to itself"),
        ('"\\ud800"', "holds '\\ud800', which is no text"),
        ("9" * 30, "holds a number of more than 64 bits"),
    ],
)
def test_a_value_that_cannot_be_read(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_value(text, f"x.y={text}")
    assert str(caught.value) == f"x.y={text}: the value {reason}"


def test_written_yaml_has_a_line_for_each_table_and_list() -> None:
    model = {"name": "x", "head": [8], "backbone": {"depths": [2, 2], "weights": None}}
    tree = {"model": model, "optimizer": {"lr": 1e-05, "name": "sgd"}, "epochs": None}
    lines = ["  name: x", "  head: [8]", "  backbone: {depths: [2, 2], weights: null}"]
    assert yaml_of(tree).splitlines() == ["model:", *lines, "optimizer: {lr: 1e-05, name: sgd}", "epochs:"]


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))  # no control characters
KEYS = st.from_regex(r"[A-Za-z_][\w.]*", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
@example({"a": {"b": "?0", "c": ["?", ":0"]}})
def test_written_yaml_is_read_as_it_was(tree: dict[str, Any]) -> None:
    found = YAML(typ="safe", pure=True).load(yaml_of(tree))
    assert found == tree
    assert repr(found) == repr(tree)  # 1 is not 1.0


# No key is dead


def test_every_key_is_read_by_some_code() -> None:
    paths = [*ROOT.glob("fer/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    tables = [MODELS, LOSSES, OPTIMIZERS, SCHEDULES, RESIZERS, PAIRINGS]
    kinds = {kind for table in tables for kind in table.values()} | {row.kind for row in BACKBONES.values()}
    kinds |= {Params, Upscaling, Tracking, Promotion, Resources, data_sets.Recipe, data_sets.Sample}
    kinds |= {data_sets.Data, data_sets.SuperResolution, data_sets.Splitting, Run, Recipe, Input, Augment, Sweep}
    assert {f"{kind.__name__}.{key}" for kind in kinds for key in kind.model_fields if key not in read} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_set_is_written_as_dvc_writes_it(path: Path) -> None:
    """So that `dvc exp run -S` changes the lines that it is asked to change, and no other."""
    text, yaml, written = path.read_text(), YAML(), StringIO()
    yaml.dump(yaml.load(text), written)
    assert written.getvalue() == text
