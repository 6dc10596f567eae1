"""Routes over the store of files and jobs: its errors with their HTTP statuses."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response

from tokenloom.finetune.errors import FileTooLargeError, NotFoundError, StorageFullError
from tokenloom.finetune.principal import OPERATOR, Principal
from tokenloom.serve.errors import ApiError
from tokenloom.serve.json_body import JSONRoute
from tokenloom.serve.key_ring import Account

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="The same key with the same request returns what was created first; a retry is safe.",
    ),
]


async def principal_of(request: Request) -> Principal:
    """Who a request is from. Admin keys see everything, and so does everybody where no key is asked for."""
    account: Account | None = request.state.account
    return OPERATOR if account is None else Principal(account.id, account.admin)


Who = Annotated[Principal, Depends(principal_of)]


class StoreRoute(JSONRoute):
    """404 for what does not exist, 413 for files over the limit, 507 when there is no room."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def translate(request: Request) -> Response:
            try:
                return await handle(request)
            except NotFoundError as error:
                raise ApiError(404, str(error), param=error.param, code=error.code) from None
            except FileTooLargeError as error:
                headers = {"Connection": "close"}  # the rest of the body may still be on its way
                raise ApiError(413, str(error), param=error.param, code=error.code, headers=headers) from None
            except StorageFullError as error:
                raise ApiError(507, str(error), code="storage_full") from None

        return translate
