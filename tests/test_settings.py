"""How a table of settings is checked: each fault is one line under the path of its key, and says the remedy."""

import json
import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, create_model, model_validator

from fer.settings import (
    Fault,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    Section,
    Unfit,
    by_name,
    check,
    differing,
    nearest,
)


class Plain(Section):
    """Nothing to set."""

    name: Literal["plain"] = "plain"


class Dashed(Section):
    name: Literal["dashed"] = "dashed"
    dash: Positive = 3
    """Pixels."""
    gap: Positive = 2

    @model_validator(mode="after")
    def _shows(self) -> "Dashed":
        if self.gap > 10 * self.dash:
            raise Unfit([Fault("gap", f"{self.gap} hides dash {self.dash}"), Fault("dash", "is too short")])
        return self


BORDERS = by_name(Plain, Dashed)


class Shape(Section):
    name: str


class Round(Shape):
    name: Literal["round"] = "round"
    radius: NonNegative = 1.0


class Square(Shape):
    name: Literal["square"] = "square"
    side: Positive
    border: Annotated[Section, OneOf(BORDERS)] = Plain()
    corners: list[Fraction] = [0.5]  # noqa: RUF012, pydantic copies it


SHAPES = by_name(Round, Square)


class Frame(Section):
    width: Positive = 1
    colour: Literal["black", "white"] = "black"
    border: Annotated[Section, OneOf(BORDERS)] = Dashed()


class Picture(Section):
    shape: Annotated[Shape, OneOf(SHAPES)] = Round()
    second: Annotated[Shape, OneOf(SHAPES)]
    """No default."""
    frame: Frame = Frame()
    title: str | None = None
    zoom: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> "Picture":
        if isinstance(self.shape, Square) and self.zoom > self.shape.side:
            raise Unfit([Fault("shape.side", f"{self.shape.side} is below zoom {self.zoom:g}"), Fault("", "too large")])
        return self


def faults(**tree: Any) -> list[str]:
    """What is wrong with a picture; nothing is with its `second`."""
    picture, found = check(Picture, {"second": {"name": "round"}, **tree})
    assert (picture is None) == bool(found)
    return [str(fault) for fault in found]


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "right": ({}, []),
    "all written": ({"shape": {"name": "square", "side": 2, "border": {"name": "dashed", "dash": 1}, "corners": []},
        "frame": {"width": 2, "colour": "white", "border": {"name": "plain"}}, "title": "x", "zoom": 2},
        []),
    # unknown keys
    "near": ({"tittle": "x"}, ["tittle: unknown key, did you mean 'title'?"]),
    "far": ({"xyz": 1}, ["xyz: unknown key; known: frame, second, shape, title, zoom"]),
    "near, in a named one": ({"shape": {"name": "square", "side": 1, "sides": 1}},
        ["shape.sides: unknown key of 'square', did you mean 'side'?"]),
    "where there are none": ({"frame": {"border": {"name": "plain", "dash": 1}}},
        ["frame.border.dash: unknown key: 'plain' has no keys"]),
    "two levels down": ({"shape": {"name": "square", "side": 1, "border": {"name": "dashed", "dsah": 1}}},
        ["shape.border.dsah: unknown key of 'dashed', did you mean 'dash'?"]),
    # names
    "unknown name, near": ({"shape": {"name": "squar"}}, ["shape.name: unknown shape 'squar', did you mean 'square'?"]),
    "unknown name, far": ({"shape": {"name": "xyz"}}, ["shape.name: unknown shape 'xyz'; known: round, square"]),
    "unknown name, below": ({"shape": {"name": "square", "side": 1, "border": {"name": "dotted"}}},
        ["shape.border.name: unknown border 'dotted'; known: dashed, plain"]),
    "no name": ({"shape": {"radius": 1.0}}, ["shape.name: missing"]),
    "name of another type": ({"shape": {"name": 3}}, ["shape.name: unknown shape '3'; known: round, square"]),
    # what is not there
    "missing": ({"shape": {"name": "square"}}, ["shape.side: missing"]),
    # types
    "text for a table": ({"shape": "round"}, ["shape: should be a table of keys, got 'round'"]),
    "text for a number": ({"zoom": "1"}, ["zoom: should be a valid number, got '1'"]),
    "bool for an int": ({"frame": {"width": True}}, ["frame.width: should be a valid integer, got True"]),
    "infinite": ({"zoom": math.inf}, ["zoom: should be a finite number, got inf"]),
    "element of a list": ({"shape": {"name": "square", "side": 1, "corners": [0.1, 2]}},
        ["shape.corners.1: should be less than or equal to 1, got 2"]),
    # what does not fit together
    "unfit, at the top": ({"shape": {"name": "square", "side": 2}, "zoom": 3},
        ["shape.side: 2 is below zoom 3", "too large"]),
    "unfit, in a section of a section": ({"frame": {"border": {"name": "dashed", "gap": 99}}},
        ["frame.border.gap: 99 hides dash 3", "frame.border.dash: is too short"]),
    "unfit, in a named one of a named one": ({"shape": {"name": "square", "side": 9, "border": {"name": "dashed",
        "dash": 1, "gap": 11}}},
        ["shape.border.gap: 11 hides dash 1", "shape.border.dash: is too short"]),
    # several at once
    "all of them": ({"zoom": 0, "tittle": "x", "frame": {"width": "2", "q": 1}, "shape": {"name": "squar"}},
        ["frame.q: unknown key; known: border, colour, width", "frame.width: should be a valid integer, got '2'",
        "shape.name: unknown shape 'squar', did you mean 'square'?", "tittle: unknown key, did you mean 'title'?",
        "zoom: should be greater than 0, got 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_faults_are_named_one_a_line(case: str) -> None:
    tree, expected = CASES[case]
    found = faults(**tree)
    assert sorted(found) == sorted(expected)
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize("tree", [None, [], "x", 3])
def test_what_is_no_table_at_all(tree: Any) -> None:
    assert check(Picture, tree) == (None, [Fault("", f"should be a table of keys, got {tree!r}")])


def test_what_is_missing_at_the_top() -> None:
    assert check(Picture, {}) == (None, [Fault("second", "missing")])


def test_a_fault_moves_under_its_section() -> None:
    fault = Fault("lr", "is wrong")
    assert str(fault) == "lr: is wrong"
    assert fault.under("optimizer") == Fault("optimizer.lr", "is wrong")
    assert fault.under("") == fault
    assert str(Fault("", "is wrong")) == "is wrong"
    assert Fault("", "is wrong").under("model.backbone") == Fault("model.backbone", "is wrong")
    assert Unfit([fault, Fault("", "so is this")]).faults == [fault, Fault("", "so is this")]


def test_a_section_is_typed_and_frozen() -> None:
    picture, _ = check(Picture, {"second": {"name": "square", "side": 2}, "zoom": 3})
    assert picture is not None
    assert isinstance(picture.second, Square)
    assert isinstance(picture.shape, Round)
    assert type(picture.zoom) is float  # a whole number is one, too
    for section, key in ((picture, "zoom"), (picture.second, "side"), (picture.frame, "width")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


# What differs from the defaults


def of(**tree: Any) -> dict[str, Any]:
    picture, found = check(Picture, {"second": {"name": "round"}, **tree})
    assert picture is not None, found
    return differing(picture)


SECOND = {"second": {"name": "round"}}  # without a default it always differs
DIFFERING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "a value": ({"zoom": 2.5}, {"zoom": 2.5}),
    "null": ({"title": None}, {}),
    "a default, written out": ({"zoom": 1.0, "frame": {"width": 1, "border": {"name": "dashed", "gap": 2}}}, {}),
    "a whole number for a float": ({"zoom": 1}, {}),
    "in a section": ({"frame": {"width": 2}}, {"frame": {"width": 2}}),
    "in the named one that is the default": ({"shape": {"name": "round", "radius": 2}},
        {"shape": {"name": "round", "radius": 2.0}}),
    "another name": ({"frame": {"border": {"name": "plain"}}}, {"frame": {"border": {"name": "plain"}}}),
    "another name, with a key": ({"shape": {"name": "square", "side": 4, "border": {"name": "plain"},
        "corners": [0.5]}},
        {"shape": {"name": "square", "side": 4}}),
    "two levels down": ({"shape": {"name": "square", "side": 4, "border": {"name": "dashed", "dash": 3, "gap": 3}}},
        {"shape": {"name": "square", "side": 4, "border": {"name": "dashed", "gap": 3}}}),
    "a list": ({"shape": {"name": "square", "side": 4, "corners": [1]}},
        {"shape": {"name": "square", "side": 4, "corners": [1.0]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERING)
def test_what_differs_from_the_defaults(case: str) -> None:
    tree, expected = DIFFERING[case]
    found = of(**tree)
    assert found == expected | SECOND
    assert json.loads(json.dumps(found)) == found
    assert check(Picture, found) == check(Picture, SECOND | tree)  # it says all


def test_a_float_is_one_however_it_is_written() -> None:
    assert json.dumps(of(zoom=2)) == json.dumps(of(zoom=2.0)) == json.dumps(of(zoom=2e0))


def test_new_keys_with_a_default_change_nothing() -> None:
    new = {"shade": (float, 0.0)}
    border = OneOf(by_name(Plain, create_model("Dashed", __base__=Dashed, **new)))
    square = create_model("Square", __base__=Square, border=(Annotated[Section, border], Plain()), **new)
    round_ = create_model("Round", __base__=Round, **new)
    frame = create_model("Frame", __base__=Frame, border=(Annotated[Section, border], border.table["dashed"]()), **new)
    shape = Annotated[Shape, OneOf(by_name(round_, square))]
    later = create_model(
        "Later", __base__=Picture, shape=(shape, round_()), second=(shape, ...), frame=(frame, frame()), **new
    )
    for tree, expected in DIFFERING.values():
        picture, found = check(later, SECOND | tree)
        assert picture is not None, found
        assert differing(picture) == expected | SECOND


# Names that are nearly right


def test_nearest_name_or_all_of_them() -> None:
    assert nearest("focl", ["pdls", "focal"]) == ", did you mean 'focal'?"
    assert nearest("foc", ["focused", "foca", "focal"]) == ", did you mean 'focused'?"  # what begins so
    assert nearest("zzz", ["pdls", "focal"]) == "; known: focal, pdls"
    assert nearest("", ["pdls", "focal"]) == "; known: focal, pdls"
