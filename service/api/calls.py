"""What one HTTP request is to the rest of this room: its id, caller, route and, once chosen, the version that answers.

It does not know bodies. Invariant: the id is ours and unique; a client's own id is never used as a key.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.api.errors import new_request_id

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

NO_VERSION = "none"


@dataclass(slots=True)
class Call:
    """One HTTP request. `status` is 0 until a response starts; `tokens` are (prompt, generated) for the log.

    `choice` says why the model `auto` means the version that answers.
    """

    route: str
    method: str = "GET"
    request_id: str = field(default_factory=new_request_id)
    tenant: str = ""
    served: ServedVersion | None = None
    choice: str | None = None
    status: int = 0
    outcome: str = ""
    tokens: tuple[int, int] | None = None
    started_s: float = field(default_factory=time.perf_counter)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that name this call and the version that answered."""
        named = [(b"x-request-id", self.request_id.encode())]
        if self.served is not None:
            named.append((b"x-model-version", self.served.artifact.encode()))
        if self.choice is not None:
            named.append((b"x-model-choice", self.choice.encode()))
        return named


def call_of(scope: Any) -> Call:
    """The call that the front put into an ASGI scope."""
    call = scope["state"]["call"]
    if not isinstance(call, Call):
        raise TypeError("the front puts a Call into every scope")
    return call
