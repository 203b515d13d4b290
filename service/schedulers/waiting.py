"""The waiting sequences, in the order in which they should run: priority, then the tenant served least, then arrival.

It does not know blocks, budgets or why a sequence waits. Invariant: `tokens`, `pixel_bytes` and `len()` equal the sum over what
waits, and a tenant that was idle starts level with the least served of the others, so that idling earns no credit.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from service.schedulers.sequence import Sequence, Share


class WaitingQueue:
    """Sequences that wait, by priority and tenant."""

    def __init__(self) -> None:
        self.tokens = 0
        self.pixel_bytes = 0
        self._number = 0
        self._lanes: dict[int, dict[str, list[Sequence]]] = {}
        self._shares: dict[str, Share] = {}

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            for line in lane.values():
                yield from line

    def enrol(self, tenant: str) -> Share:
        """The tenant's share, for one more live sequence of it."""
        share = self._shares.get(tenant)
        if share is None:
            least = min((other.served for other in self._shares.values()), default=0)
            share = self._shares[tenant] = Share(tenant, least)
        share.live += 1
        return share

    def dismiss(self, share: Share) -> None:
        """One live sequence of the tenant ended."""
        share.live -= 1
        if not share.live:
            del self._shares[share.tenant]

    def add(self, sequence: Sequence) -> None:
        """The sequence waits, at its place by arrival (a preempted one keeps its place)."""
        lane = self._lanes.setdefault(sequence.request.priority, {})
        insort(lane.setdefault(sequence.share.tenant, []), sequence, key=lambda other: other.arrival)
        self._number += 1
        self.tokens += len(sequence.tokens)
        self.pixel_bytes += sequence.request.pixel_bytes

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits no longer."""
        priority, tenant = sequence.request.priority, sequence.share.tenant
        lane = self._lanes[priority]
        lane[tenant].remove(sequence)
        if not lane[tenant]:
            del lane[tenant]
            if not lane:
                del self._lanes[priority]
        self._number -= 1
        self.tokens -= len(sequence.tokens)
        self.pixel_bytes -= sequence.request.pixel_bytes

    def in_order(self) -> Iterator[Sequence]:
        """Each waiting sequence in the order in which it should run. The one given last may be removed while iterating."""
        for priority in sorted(self._lanes):
            lane = self._lanes[priority]
            places = dict.fromkeys(lane, 0)
            while places:
                tenant = min(places, key=lambda name: self._shares[name].served)
                line, place = lane.get(tenant, []), places[tenant]
                if place >= len(line):
                    del places[tenant]
                    continue
                sequence = line[place]
                yield sequence
                if place < len(line) and line[place] is sequence:
                    places[tenant] = place + 1
