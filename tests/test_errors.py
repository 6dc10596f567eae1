"""Messages name what is at fault, however long that is."""

from tokenloom.errors import ModelError, RequestError


def test_a_long_message_keeps_its_ends() -> None:
    text = str(ModelError(f"tensor {'x' * 10**6} is missing"))
    assert len(text) < 2000
    assert text.startswith("tensor xxx") and text.endswith("xxx is missing")


def test_a_short_one_is_whole() -> None:
    assert str(RequestError("n: must be at least 1", param="n")) == "n: must be at least 1"
