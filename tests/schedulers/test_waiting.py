from __future__ import annotations

from service.schedulers.waiting import WaitingQueue
from tests.schedulers.test_blocks import make_sequence


def fill(queue: WaitingQueue, *rows: tuple[str, int]) -> list:
    """Sequences of (tenant, priority), in order of arrival."""
    sequences = []
    for tenant, priority in rows:
        sequence = make_sequence("abc", tenant=tenant, priority=priority, arrival=len(sequences))
        sequence.share = queue.enrol(tenant)
        queue.add(sequence)
        sequences.append(sequence)
    return sequences


def order(queue: WaitingQueue) -> list[int]:
    return [sequence.arrival for sequence in queue.in_order()]


def test_priority_before_arrival():
    queue = WaitingQueue()
    fill(queue, ("a", 1), ("a", 0), ("a", -1), ("a", 0))
    assert order(queue) == [2, 1, 3, 0]


def test_the_tenant_served_least_goes_first():
    queue = WaitingQueue()
    first, _, other = fill(queue, ("busy", 0), ("busy", 0), ("quiet", 0))
    first.share.served = 100
    assert order(queue) == [2, 0, 1]
    other.share.served = 200
    assert order(queue) == [0, 1, 2]


def test_service_given_while_iterating_counts():
    queue = WaitingQueue()
    fill(queue, ("a", 0), ("a", 0), ("b", 0), ("b", 0))
    taken = []
    for sequence in queue.in_order():
        taken.append(sequence.share.tenant)
        sequence.share.served += 10
        queue.remove(sequence)
    assert taken == ["a", "b", "a", "b"]
    assert len(queue) == queue.tokens == 0


def test_a_new_tenant_starts_level_and_idling_earns_nothing():
    queue = WaitingQueue()
    busy, other = queue.enrol("busy"), queue.enrol("other")
    busy.served, other.served = 1000, 400
    assert queue.enrol("new").served == 400
    queue.dismiss(busy)
    assert queue.enrol("busy").served == 400, "a tenant that left comes back level with the least served"
    assert queue.enrol("other") is other


def test_a_preempted_sequence_keeps_its_place():
    queue = WaitingQueue()
    first, second, _ = fill(queue, ("a", 0), ("a", 0), ("a", 0))
    queue.remove(second)
    queue.remove(first)
    queue.add(second)
    queue.add(first)
    assert order(queue) == [0, 1, 2]
    assert queue.tokens == 9
