"""One sequence: its tokens, how far they are computed, and the legal moves of its state.

A sequence closes the gap between `scheduled` (positions handed to the worker) and `wanted` (positions that must be computed before the
next token can be known); chunked prefill, decode and re-prefill are the same gap. It does not know blocks' owners, plans or the text.
Invariant: computed <= scheduled <= wanted <= known + in flight, and every change of state is in `MOVES`.
"""

from __future__ import annotations

from enum import Enum

from service.schedulers.streams import Stream
from service.telemetry import Latencies
from service.types.request import GenerationRequest, TokenLogprob, Usage


class State(Enum):
    """Where a sequence stands. A preempted sequence is WAITING again: it keeps its tokens and loses its row and blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHED}),
    State.RUNNING: frozenset({State.WAITING, State.FINISHED}),
    State.FINISHED: frozenset(),
}


class InvariantBroken(Exception):
    """A fault in the scheduler itself: the loop stops loudly rather than go on with a wrong table."""


class Share:
    """What one tenant was served, in tokens; the waiting queue prefers the tenant that was served least."""

    __slots__ = ("live", "served", "tenant")

    def __init__(self, tenant: str, served: int) -> None:
        self.tenant = tenant
        self.served = served
        self.live = 0


class Sequence:
    """One sequence from acceptance to its end.

    `epoch` counts the times it lost its place, so that results of steps sent before are recognised and dropped. `tables[g]` holds block
    ids of KV group g by table index, 0 where released; entries below `released[g]` are null, its sinks apart; those below `named[g]` were
    named in the prefix cache. `next_change` is the first position whose
    computation needs a change of a table, `next_proof` the number of computed positions that fills the next block to name. `limit` is
    the number of positions ever computed (the last token allowed is never read); `decoding` is True from the first token known since it
    entered its row. Times are the loop's clock in seconds, 0 before they happened.
    """

    __slots__ = (
        "arrival",
        "arrived_s",
        "cached_tokens",
        "computed",
        "deadline_s",
        "deaths",
        "decoding",
        "died_at",
        "end_ids",
        "epoch",
        "first_token_s",
        "hit_blocks",
        "image_tokens",
        "in_flight",
        "keys",
        "last_token_s",
        "latencies",
        "leads",
        "limit",
        "max_length",
        "max_tokens",
        "min_length",
        "named",
        "next_change",
        "next_proof",
        "opened_s",
        "order",
        "preemptions",
        "prompt_scores",
        "prompt_tokens",
        "proven_blocks",
        "released",
        "request",
        "row",
        "scheduled",
        "scored",
        "share",
        "state",
        "stream",
        "suspect_until",
        "tables",
        "tokens",
        "unproven",
        "wanted",
    )

    def __init__(self, request: GenerationRequest, arrival: int, share: Share, stream: Stream, latencies: Latencies) -> None:
        self.request = request
        self.arrival = arrival
        self.share = share
        self.stream = stream
        self.latencies = latencies
        self.order = (request.priority, arrival)
        self.state = State.WAITING
        self.tokens = list(request.prompt)
        self.prompt_tokens = len(request.prompt)
        self.image_tokens = request.image_tokens
        self.max_tokens = request.stop.max_tokens
        self.min_length = self.prompt_tokens + request.stop.min_tokens
        self.max_length = self.prompt_tokens + self.max_tokens
        self.limit = self.prompt_tokens + max(self.max_tokens - 1, 0)
        self.end_ids = request.stop.effective_ids
        self.epoch = 0
        self.preemptions = 0
        self.deaths = self.died_at = self.suspect_until = 0
        self.arrived_s = self.opened_s = self.first_token_s = self.last_token_s = 0.0
        self.deadline_s = request.deadline_s
        self.cached_tokens: int | None = None
        self.scored = request.prompt_logprobs is None
        self.keys: list[bytes] = []
        self.leads: bytes | None = None
        self._leave_place()

    def _leave_place(self) -> None:
        self.row = -1
        self.decoding = False
        self.scheduled = self.computed = self.in_flight = 0
        self.hit_blocks = self.proven_blocks = self.next_change = self.next_proof = 0
        self.wanted = min(len(self.tokens), self.limit)
        self.tables: list[list[int]] = []
        self.released: list[int] = []
        self.named: list[int] = []
        self.unproven: list[tuple[int, int, int, int]] = []
        self.prompt_scores: list[TokenLogprob] = []

    @property
    def length(self) -> int:
        """Tokens that the worker knows once every outstanding step is done."""
        return len(self.tokens) + self.in_flight

    @property
    def generated(self) -> int:
        """Tokens generated and known to the parent."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def gap(self) -> int:
        """Positions that may be scheduled now."""
        return self.wanted - self.scheduled

    @property
    def usage(self) -> Usage:
        """What is billed."""
        return Usage(self.prompt_tokens, self.cached_tokens or 0, self.generated)

    def move(self, to: State) -> None:
        """Change state; a move that is not in `MOVES` is a fault of the scheduler."""
        if to not in MOVES[self.state]:
            raise InvariantBroken(f"sequence {self.arrival}: {self.state.value} -> {to.value}")
        self.state = to

    def dispatch(self, length: int, samples: bool) -> None:
        """`length` more positions were sent to the worker; with `samples` the token after them comes back."""
        self.scheduled += length
        if samples:
            self.in_flight += 1
            self.wanted = min(len(self.tokens) + self.in_flight, self.limit)

    def withdraw(self, to: State) -> None:
        """Lose the row: outstanding results are dropped, everything known stays. Blocks must have been given back before."""
        self.move(to)
        self.epoch += 1
        self._leave_place()
