"""Tables on terminals of every width, and in files."""

import pytest

from pipelines.commands import terminal

NUMBERS = ("91.07", "91.77", "91.16", "91.69", "0.212", "20/20")
RUN = "swin_nr_fpdls_tiny-s1111-8e756bd5"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_folds_names_and_cuts_no_number(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", terminal._Console(force_terminal=True, width=width))
    columns = ("run", "val", "test", "unleaked", "exact", "ECE", "epoch")
    terminal.print_rows(columns, [(RUN, *NUMBERS)])
    head, _, row, *rest = filter(str.strip, capsys.readouterr().out.splitlines())
    assert head.split() == [*columns]
    name, *numbers = row.split()
    assert numbers == [*NUMBERS]
    assert name + "".join(rest).strip() == RUN
    assert len(row) <= max(width, 65)  # as long as it is with a name of 18 characters


def test_a_file_gets_whole_lines_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a" * 200 + f" - {number}", "1.5 (1.2, 1.8)", "3") for number in "12"]
    terminal.print_rows(("difference", "accuracy", "p"), rows, "Title")
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told[-3:-1]] == [" ".join(row).split() for row in rows]


def test_brackets_of_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.console.print(terminal.bold("a[b]/[/c].csv"))
    with terminal.doing("Writing a[b]/[/c].csv"):
        pass
    assert capsys.readouterr().out == "a[b]/[/c].csv\nWriting a[b]/[/c].csv\n"
    terminal.print_rows(("class [x]", "n"), [("[old]", "1"), ("[/old]", "2")], "[title]")
    told = capsys.readouterr().out
    assert all(word in told for word in ("class [x]", "[old]", "[/old]", "[title]"))


def test_words_are_wrapped_where_they_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "console", terminal._Console(force_terminal=True, width=40))
    terminal.print_rows(("class", "accuracy"), [("x" * 30, "-91.50 (-92.20, -90.80)")])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 40
    assert all(word in told for word in ("-91.50", "(-92.20,", "-90.80)"))
