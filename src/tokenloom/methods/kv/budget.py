"""Budgets: a number of tokens, or a part of the prompt."""

from __future__ import annotations


def check_budget(budget: int | float) -> None:
    """Raise ValueError unless this is a number of tokens (1, 2, ...) or a part (0 < x < 1)."""
    if not 0 < budget < 2**31 or (budget > 1 and budget != int(budget)):
        raise ValueError(f"budget must be a number of tokens, or a part between 0 and 1, not {budget}")


def check_window(window: int | float) -> None:
    """Raise ValueError unless this is a number of tokens (0, 1, ...) or a part of the budget (0 < x < 1)."""
    if not 0 <= window < 2**31 or (window > 1 and window != int(window)):
        raise ValueError(f"window must be a number of tokens, or a part of the budget, not {window}")


def tokens_of(budget: int | float, prompt_tokens: int) -> int:
    """How many tokens that is; 1 is one token, 1.0 the whole prompt."""
    if isinstance(budget, float) and budget <= 1:
        return max(1, int(budget * prompt_tokens))
    return int(budget)


def at_least(minimum: int | float, **knobs: float) -> None:
    """Raise ValueError naming the first knob that is smaller."""
    for name, value in knobs.items():
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value}")


def part(**knobs: float) -> None:
    """Raise ValueError naming the first knob that is not between 0 and 1."""
    for name, value in knobs.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")


def one_of(choices: tuple[str, ...], **knobs: str) -> None:
    """Raise ValueError naming the first knob that is none of the choices."""
    for name, value in knobs.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value}")
