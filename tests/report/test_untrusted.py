"""Text of strangers, before it meets a page or a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_prune.cli.output import Output
from robust_prune.untrusted import readable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("größe", "größe"),
        ("two\nlines", "two\nlines"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("nul\x00", "nul\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("ערך", "\u2068ערך\u2069"),
        ("\u2069ערך", "\u2068\\u2069ערך\u2069"),
    ],
)
def test_what_hides_is_written_out(text: str, shown: str) -> None:
    assert readable(text) == shown
    assert readable({text: [text, 1, None]}) == {shown: [shown, 1, None]}


@given(st.text())
def test_nothing_hidden_is_left(text: str) -> None:
    shown = readable(text)
    shown.encode("utf-8")
    inside = shown.removeprefix("\u2068").removesuffix("\u2069")
    assert not [c for c in inside if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
    assert not {"\u202a", "\u202b", "\u202d", "\u202e", "\u2066", "\u2067", "\u2068"} & {*inside}


@given(st.text(), st.integers(6, 40))
def test_shortened_fits(text: str, most: int) -> None:
    line = shortened(readable(text), most)
    assert "\n" not in line
    assert len(line) <= most + 2  # and the two marks of an isolate
    assert line.count("\u2068") == line.count("\u2069")


def test_shortened_keeps_both_ends() -> None:
    assert shortened("stages.2.1.transformer.0.attn.qkv", 20) == "stages.2.…0.attn.qkv"


def test_a_terminal_gets_text_and_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.table("[bold]title[/]", ("layer",), [("[red]a[/red]",), ("[/]",), ("\x1b]0;x\x07",)])
    output.line("[/] \x1b[2J")
    shown = capsys.readouterr().out
    for text in ("[bold]title[/]", "[red]a[/red]", "[/] \\x1b[2J", "\\x1b]0;x\\x07"):
        assert text in shown
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
