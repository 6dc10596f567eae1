"""Stop strings never leak a character, wherever the token borders fall."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tokenloom.engine.request import StopText
from tokenloom.engine.sampling_params import SamplingParams


class Pieces:
    """A detokenizer whose token i is the i-th piece of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def finish(self) -> str:
        return ""


def run(pieces: list[str], **params: object) -> tuple[str, str | None, list[str]]:
    stopper = StopText(SamplingParams(max_tokens=99, **params), Pieces(pieces))  # type: ignore[arg-type]
    shown: list[str] = []
    for i in range(len(pieces)):
        text, stop = stopper.push(i, i + 1)
        shown.append(text)
        if stop is not None:
            return "".join(shown), stop, shown
    shown.append(stopper.finish())
    return "".join(shown), None, shown


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    shown, stop, _ = run(pieces, stop=stops)
    if not any(s in text for s in stops):
        assert (shown, stop) == (text, None)
        return
    assert stop is not None
    # Tokens are looked at one at a time: the stop is the first in the text up to the token that ends one.
    seen = ""
    for piece in pieces:
        seen += piece
        if any(s in seen for s in stops):
            break
    at = min(seen.find(s) for s in stops if s in seen)
    assert shown == seen[:at] and seen[at:].startswith(stop)


@given(st.text("abc", max_size=20), st.text("ab", min_size=1, max_size=3))
def test_nothing_shown_is_taken_back(text: str, stop: str) -> None:
    _, _, shown = run(list(text), stop=[stop])
    so_far = ""
    for piece in shown:
        so_far += piece
        assert stop not in so_far
        assert text.startswith(so_far)


def test_include_stop_keeps_it() -> None:
    assert run(["one t", "wo th", "ree"], stop="two", include_stop=True)[:2] == ("one two", "two")


def test_the_longer_of_two_stops_at_one_place_is_reported() -> None:
    assert run(["xENDING"], stop=["END", "ENDING"])[:2] == ("x", "ENDING")


def test_no_stop_before_min_tokens() -> None:
    assert run(["a", "STOP", "b", "STOP"], stop="STOP", min_tokens=3)[:2] == ("aSTOPb", "STOP")
