"""`tokenloom keys`: make, list and revoke the API keys of a server, running or not."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from tokenloom.cli_options import Config, Set, err, out, read_settings

if TYPE_CHECKING:
    from tokenloom.serve.key_store import KeyStore, StoredKey

keys_app = typer.Typer(no_args_is_help=True, help="API keys of this home folder's server.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@keys_app.command("create")
def create_key(
    admin: Annotated[bool, typer.Option("--admin", help="Also opens the operator's routes.")] = False,
    name: Annotated[str, typer.Option(help="A label, for lists only.")] = "",
    rpm: Annotated[int | None, typer.Option(help="Requests per minute; 0: no limit.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens per minute; 0: no limit.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at work at once; 0: no limit.")] = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Make a key and print it, once: only a hash of it is kept. Limits not given are the server's."""
    store = _open(config, set_)
    key, token = store.create(name, admin=admin, rpm=rpm, tpm=tpm, max_concurrent=max_concurrent)
    err.print(f"{key.id} is {_kind(key)}; it cannot be shown again:", highlight=False)
    print(token)


@keys_app.command("list")
def list_keys(json_: Json = False, config: Config = None, set_: Set = None) -> None:
    """List keys by id, revoked ones included."""
    keys = _open(config, set_).list()
    if json_:
        print(json.dumps([_fields(key) for key in keys], indent=2))
        return
    # Whole, however narrow the terminal: `revoke` wants it.
    table = Table(
        Column("id", no_wrap=True, min_width=28),
        "name",
        "kind",
        "rpm",
        "tpm",
        "concurrent",
        "created",
        "revoked",
    )
    for key in keys:
        limits = ("" if limit is None else str(limit) for limit in (key.rpm, key.tpm, key.max_concurrent))
        table.add_row(
            key.id, escape(key.name), _kind(key), *limits, _date(key.created_at), _date(key.revoked_at)
        )
    out.print(table)


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `tokenloom keys list` shows it.")],
    config: Config = None,
    set_: Set = None,
) -> None:
    """Take a key's rights away; a running server knows it within seconds."""
    print(f"{_open(config, set_).revoke(key_id).id} is revoked")


def _open(config: Any, extra: list[str] | None) -> KeyStore:
    from tokenloom.serve.key_ring import open_key_store

    return open_key_store(read_settings({}, config, extra))


def _kind(key: StoredKey) -> str:
    return "admin" if key.admin else "user"


def _date(seconds: int | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def _fields(key: StoredKey) -> dict[str, Any]:
    names = ("id", "name", "admin", "rpm", "tpm", "max_concurrent", "created_at", "revoked_at")
    return {name: getattr(key, name) for name in names}
