"""How a table of settings is checked: each fault is one line under the path of its key, and says the remedy."""

import json
import math
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from fer.settings import Fault, Fraction, OneOf, Positive, Section, Unfit, by_name, check, differing, nearest


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
    radius: float = 1.0


class Square(Shape):
    name: Literal["square"] = "square"
    side: Positive
    border: Annotated[Section, OneOf(BORDERS)] = Plain()
    corners: list[Fraction] = [0.5]  # noqa: RUF012, pydantic copies it


SHAPES = by_name(Round, Square)


class Frame(Section):
    width: Positive = 1
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


SECOND = {"second": {"name": "round"}}  # has no default


def square(**keys: Any) -> dict[str, Any]:
    return {"shape": {"name": "square", "side": 4, **keys}}


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all written": ({**square(border={"name": "dashed", "dash": 1}, corners=[]),
                     "frame": {"width": 2, "border": {"name": "plain"}}, "title": "x", "zoom": 2}, []),
    # unknown keys and names
    "far": ({"xyz": 1}, ["xyz: unknown key; known: frame, second, shape, title, zoom"]),
    "where there are none": ({"frame": {"border": {"name": "plain", "dash": 1}}},
        ["frame.border.dash: unknown key: 'plain' has no keys"]),
    "two levels down": (square(border={"name": "dashed", "dsah": 1}),
        ["shape.border.dsah: unknown key of 'dashed', did you mean 'dash'?"]),
    "unknown name": (square(border={"name": 3}), ["shape.border.name: unknown border '3'; known: dashed, plain"]),
    "no name": ({"shape": {"radius": 1.0}}, ["shape.name: missing"]),
    # values
    "missing": ({"shape": {"name": "square"}}, ["shape.side: missing"]),
    "text for a table": ({"shape": "round"}, ["shape: should be a table of keys, got 'round'"]),
    "bool for an int": ({"frame": {"width": True}}, ["frame.width: should be a valid integer, got True"]),
    "infinite": ({"zoom": math.inf}, ["zoom: should be a finite number, got inf"]),
    "element of a list": (square(corners=[0.1, 2]), ["shape.corners.1: should be less than or equal to 1, got 2"]),
    # what does not fit together
    "unfit, at the top": ({**square(), "zoom": 5}, ["shape.side: 4 is below zoom 5", "too large"]),
    "unfit, in a named one of a named one": (square(border={"name": "dashed", "dash": 1, "gap": 11}),
        ["shape.border.gap: 11 hides dash 1", "shape.border.dash: is too short"]),
    "several": ({"zoom": 0, "tittle": "x", "frame": {"width": "2", "q": 1}},
        ["frame.q: unknown key; known: border, width", "frame.width: should be a valid integer, got '2'",
        "tittle: unknown key, did you mean 'title'?", "zoom: should be greater than 0, got 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_faults_are_named_one_a_line(case: str) -> None:
    tree, expected = CASES[case]
    picture, found = check(Picture, SECOND | tree)
    assert (sorted(map(str, found)), picture is None) == (sorted(expected), bool(expected))


def test_what_is_no_table_at_all() -> None:
    assert check(Picture, [3]) == (None, [Fault("", "should be a table of keys, got [3]")])
    assert check(Picture, {}) == (None, [Fault("second", "missing")])


DEFAULTS = {"title": None, "zoom": 1, "frame": {"width": 1, "border": {"name": "dashed", "gap": 2}}}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (DEFAULTS, {}),
        ({"shape": {"name": "round", "radius": 2}}, {"shape": {"name": "round", "radius": 2.0}}),
        ({"frame": {"border": {"name": "plain"}}}, {"frame": {"border": {"name": "plain"}}}),
        (square(border={"name": "dashed", "dash": 3, "gap": 3}), square(border={"name": "dashed", "gap": 3})),
        (square(corners=[1]), square(corners=[1.0])),
    ],
)
def test_what_differs_from_the_defaults(tree: dict[str, Any], expected: dict[str, Any]) -> None:
    found = differing(Picture.model_validate(SECOND | tree))
    assert json.dumps(found, sort_keys=True) == json.dumps(SECOND | expected, sort_keys=True)  # 2.0 is not 2
    assert check(Picture, found) == check(Picture, SECOND | tree)  # it says all


def test_nearest_name_or_all_of_them() -> None:
    known = ["pdls", "focused", "focal"]
    assert nearest("focl", known) == ", did you mean 'focal'?"
    assert nearest("foc", known) == ", did you mean 'focused'?"  # the first that begins so
    assert nearest("", known) == "; known: focal, focused, pdls"
