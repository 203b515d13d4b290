from __future__ import annotations

import pytest

from service.schedulers.blocks import BlockSpace, TableChanges
from service.schedulers.prefix_cache import PrefixCache
from tests.fakes import Far, layout
from tests.schedulers.support import ask, generate, read_all, small_backend, with_router
from tests.schedulers.test_blocks import make_sequence


def hit_after(first, second, windows=(None,), digest=("d", "d"), enabled=True):
    """Blocks that `second` finds after `first` was computed."""
    space = BlockSpace(layout(4, windows), (40,) * len(windows))
    cache = PrefixCache(space, digest[0], enabled)
    space.open(first)
    space.extend(first, len(first.tokens), TableChanges())
    first.computed = len(first.tokens)
    space.release_behind(first, first.computed, TableChanges())
    cache.prove(first)
    space.free(first)
    return PrefixCache(space, digest[1], enabled).match(second)


def test_equal_prompts_share_all_full_blocks_but_the_last_token_is_computed():
    assert hit_after(make_sequence("a" * 13), make_sequence("a" * 13)) == 3
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 12)) == 2
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 13)) == 3
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 4)) == 0


def test_a_block_is_found_only_after_the_same_history():
    assert hit_after(make_sequence("aaaabbbbcccc"), make_sequence("aaaaXbbbcccc!")) == 1
    assert hit_after(make_sequence("aaaabbbbcccc"), make_sequence("bbbbcccc!")) == 0


def test_salt_adapter_and_version_separate():
    assert hit_after(make_sequence("a" * 12, cache_salt="s"), make_sequence("a" * 12, cache_salt="s")) == 2
    assert hit_after(make_sequence("a" * 12, cache_salt="s"), make_sequence("a" * 12)) == 0
    assert hit_after(make_sequence("a" * 12, cache_salt="s"), make_sequence("a" * 12, cache_salt="t")) == 0
    assert hit_after(make_sequence("a" * 12, adapter="s"), make_sequence("a" * 12, cache_salt="s")) == 0
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 12), digest=("d", "e")) == 0
    assert hit_after(make_sequence("a" * 12, tenant="x"), make_sequence("a" * 12, tenant="y")) == 2


def test_switched_off_or_with_prompt_log_probs_nothing_is_found():
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 12), enabled=False) == 0
    assert hit_after(make_sequence("a" * 12), make_sequence("a" * 12, prompt_logprobs=0)) == 0
    assert hit_after(make_sequence("a" * 12, prompt_logprobs=0), make_sequence("a" * 12)) == 2


def test_a_windowed_group_needs_its_window_only():
    assert hit_after(make_sequence("a" * 33), make_sequence("a" * 33), windows=(None, 6)) == 8


def test_a_hit_needs_every_group():
    space = BlockSpace(layout(4, (None, 6)), (40, 40))
    cache = PrefixCache(space, "d")
    first, second = make_sequence("a" * 33), make_sequence("a" * 33)
    space.open(first)
    space.extend(first, 33, TableChanges())
    first.computed = 33
    cache.prove(first)
    space.free(first)
    keys = cache.keys(second, 8)
    space.pools[1].forget(space.pools[1].by_key[keys[7]])
    assert cache.match(second) == 7
    space.pools[1].forget(space.pools[1].by_key[keys[5]])
    assert cache.match(second) == 5
    space.pools[0].forget(space.pools[0].by_key[keys[2]])
    assert cache.match(second) == 2


def computed(space, cache, sequence, slices):
    """Compute, prove and release the sequence slice by slice, as the planner does."""
    space.open(sequence)
    for end in slices:
        space.release_behind(sequence, sequence.computed, TableChanges())
        assert space.extend(sequence, end, TableChanges())
        sequence.scheduled = sequence.computed = end
        cache.prove(sequence)
    space.free(sequence)


def test_a_hit_needs_sinks_window_and_every_far_block_of_the_next_query():
    space = BlockSpace(layout(4, (Far(6),)), (40, 40))
    cache = PrefixCache(space, "d")
    first, second = make_sequence("a" * 33), make_sequence("a" * 33)
    computed(space, cache, first, range(3, 34, 3))
    assert cache.match(second) == 8
    keys = cache.keys(second, 8)
    near, far = space.pools
    # A query at 32 reads near blocks 0 and 6, 7, and far blocks 1 … 5.
    assert sorted(keys.index(key) for key in far.by_key) == [1, 2, 3, 4, 5]
    near.forget(near.by_key[keys[3]])
    assert cache.match(second) == 8
    far.forget(far.by_key[keys[5]])
    assert cache.match(second) == 7
    far.forget(far.by_key[keys[2]])
    assert cache.match(second) == 3, "behind block 4 the window needs block 3, behind block 6 far block 2 is read, and both are gone"
    near.forget(near.by_key[keys[0]])
    assert cache.match(second) == 0


@pytest.mark.parametrize("refresh", [1, 4])
def test_blocks_that_became_far_after_they_were_proven_are_named(refresh):
    space = BlockSpace(layout(4, (Far(6, refresh),)), (40, 40))
    cache = PrefixCache(space, "d")
    computed(space, cache, make_sequence("a" * 33), [6, *range(7, 34)])
    assert len(space.pools[1].by_key) == 5


def test_an_adopted_far_table_is_not_copied_again():
    backend = small_backend(windows=(Far(6),))

    async def body(router):
        (first,) = await read_all(router.submit([ask("turn one of many tokens", 20)]))
        before = len(backend.plans)
        (second,) = await read_all(router.submit([ask(tuple(b"turn one of many tokens") + first.tokens + tuple(b" next"), 5)]))
        return second, before

    second, before = with_router(body, backend)
    assert second.ending.usage.cached_tokens == 40
    demoted = [block for plan in backend.plans[before:] for change in plan.demote for block in change.targets]
    assert len(demoted) <= 3, "only what the second turn itself left behind its window"


def test_blocks_released_before_they_were_proven_are_named_afterwards():
    prompt = "a system prompt that is shared by both"

    async def body(router):
        await read_all(router.submit([ask(prompt + " and one long tail that moves the window on", 2)]))
        (second,) = await read_all(router.submit([ask(prompt + " but another tail", 6)]))
        return second

    second = with_router(body, small_backend(windows=(None, 6)))
    assert second.ending.usage.cached_tokens == 36
    assert second.content == generate([ask(prompt + " but another tail", 6)], small_backend(windows=(None, 6)))[0].content


def test_generated_tokens_are_found_by_the_next_turn():
    async def body(router):
        (first,) = await read_all(router.submit([ask("turn one", 20)]))
        (second,) = await read_all(router.submit([ask(tuple(b"turn one") + first.tokens + tuple(b" next"), 5)]))
        return second

    assert with_router(body).ending.usage.cached_tokens == 24
