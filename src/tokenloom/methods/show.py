"""What `tokenloom methods` prints."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

import tokenloom.methods.drafting
import tokenloom.methods.kv  # noqa: F401  # both register their methods
from tokenloom.errors import RequestError
from tokenloom.methods.registry import Entry, entries


def show_methods(out: Console, as_json: bool) -> None:
    """All methods, by hook and name."""
    if as_json:
        print(json.dumps([_fields(entry) for entry in entries()], indent=2))
        return
    table = Table("hook", "method", "arXiv", "what it promises")
    for entry in entries():
        table.add_row(entry.hook, entry.name, entry.arxiv, entry.claim)
    out.print(table)


def show_method(name: str, out: Console, as_json: bool) -> None:
    """One method: its knobs, their defaults and what they mean. Raises RequestError if there is none."""
    found = [entry for entry in entries() if entry.name == name]
    if not found:
        raise RequestError(f"no method {name!r}; `tokenloom methods` lists them")
    for entry in found:
        if as_json:
            print(json.dumps(_fields(entry), indent=2))
            continue
        paper = f" (arXiv {entry.arxiv})" if entry.arxiv else ""
        spec = ", ".join(f"{knob}={value!r}" for knob, value in entry.knobs.items())
        out.print(f"[bold]{entry.title}[/]{paper}\n\n{entry.hook}: {entry.name}({spec})\n", highlight=False)
        print(inspect.getdoc(entry.make))


def _fields(entry: Entry) -> dict[str, Any]:
    return {
        "hook": entry.hook,
        "name": entry.name,
        "title": entry.title,
        "arxiv": entry.arxiv,
        "claim": entry.claim,
        "knobs": entry.knobs,
    }
