"""Finding blocks computed before: chained hashes of full blocks of tokens, per version, adapter and salt.

A block's key is the hash of the block before it and its own tokens, so that equal keys mean equal histories; the chain starts with the
version's digest, the adapter and the request's `cache_salt` (requests share blocks only where all three are equal, so a salt keeps others
from learning a prompt by timing it). A block that holds image tokens also hashes the digests and places of their images.
It does not know plans or workers. Invariants: a hit counts only where every KV group still holds
what the next query reads; the last known token is always computed; only KV proven by finite logits is named.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from service.schedulers.blocks import BlockSpace
from service.schedulers.sequence import Sequence
from service.types.request import GenerationRequest

_KEY_BYTES = 16


class PrefixCache:
    """The cached blocks of one version. With `enabled` False nothing is found or named."""

    def __init__(self, space: BlockSpace, digest: str, enabled: bool = True) -> None:
        self.enabled = enabled
        self._space = space
        self._digest = digest

    def root(self, request: GenerationRequest) -> bytes:
        """Where the chain of a request starts."""
        hasher = blake2b(digest_size=_KEY_BYTES)
        for part in (self._digest, request.adapter or "", request.cache_salt):
            raw = part.encode("utf-8", "surrogatepass")
            hasher.update(len(raw).to_bytes(8, "little"))
            hasher.update(raw)
        return hasher.digest()

    def keys(self, sequence: Sequence, blocks: int) -> list[bytes]:
        """The keys of the sequence's first `blocks` blocks (kept on the sequence, so each is hashed once)."""
        keys = sequence.keys
        if len(keys) < blocks:
            size, tokens = self._space.block_tokens, sequence.tokens
            key = keys[-1] if keys else self.root(sequence.request)
            for index in range(len(keys), blocks):
                hasher = blake2b(key, digest_size=_KEY_BYTES)
                if self._space.layout.dense_prompts and index == sequence.prompt_tokens // size:
                    hasher.update(sequence.prompt_tokens.to_bytes(8, "little"))
                hasher.update(array("q", tokens[index * size : (index + 1) * size]).tobytes())
                if sequence.image_tokens:
                    hasher.update(_images_within(sequence.request, index * size, (index + 1) * size))
                key = hasher.digest()
                keys.append(key)
        return keys

    def reusable_blocks(self, sequence: Sequence) -> int:
        """Full blocks before the last known token: the most that a hit can give."""
        if not self.enabled or sequence.request.prompt_logprobs is not None:
            return 0
        return (len(sequence.tokens) - 1) // self._space.block_tokens

    def match(self, sequence: Sequence) -> int:
        """Blocks of the longest usable prefix: every group holds what a query right behind it reads."""
        most = self.reusable_blocks(sequence)
        if not most:
            return 0
        keys = self.keys(sequence, most)
        runs = [self._runs(group, keys, most) for group in range(len(self._space.pools))]
        for blocks in range(most, 0, -1):
            if all(self._serves(group, run, blocks) for group, run in enumerate(runs)):
                return blocks
        return 0

    def _spans(self, group: int, blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Table indices that a query right behind `blocks` blocks reads of them in a group: sinks, and the rest. Either may be empty."""
        layout, position = self._space.layout, blocks * self._space.block_tokens
        kind = layout.groups[group]
        first, end = layout.first_read(kind, position), min(layout.entries(kind, position), blocks)
        return (0, min(kind.sink_blocks, first, end)), (first, end)

    def _serves(self, group: int, runs: list[int], blocks: int) -> bool:
        return all(end <= first or runs[end - 1] >= end - first for first, end in self._spans(group, blocks))

    def _runs(self, group: int, keys: list[bytes], most: int) -> list[int]:
        """For each block, how many blocks in a row up to and with it the group holds."""
        by_key, runs, run = self._space.pools[group].by_key, [0] * most, 0
        for index in range(most):
            run = run + 1 if keys[index] in by_key else 0
            runs[index] = run
        return runs

    def adopt(self, sequence: Sequence, blocks: int) -> None:
        """Start the tables of an opened sequence with its `blocks` matched blocks."""
        for group, pool in enumerate(self._space.pools):
            spans = self._spans(group, blocks)
            held = {index: pool.by_key[sequence.keys[index]] for first, end in spans for index in range(first, end)}
            self._space.adopt(sequence, group, spans[1][0], held)
            sequence.named[group] = spans[1][1]
        sequence.scheduled = sequence.computed = blocks * self._space.block_tokens
        sequence.hit_blocks = sequence.proven_blocks = blocks

    def prove(self, sequence: Sequence) -> None:
        """Finite logits came from everything computed so far: name its full blocks."""
        full = sequence.computed // self._space.block_tokens
        sequence.next_proof = (full + 1) * self._space.block_tokens
        if self.enabled:
            keys = self.keys(sequence, full)
            for group, pool in enumerate(self._space.pools):
                # Blocks become far long after they were proven, so each group has its own count of named blocks.
                table, end = sequence.tables[group], min(full, len(sequence.tables[group]))
                for index in range(sequence.named[group], end):
                    if table[index]:
                        pool.name(table[index], keys[index])
                sequence.named[group] = max(end, sequence.named[group])
            for group, index, block, stamp in sequence.unproven:
                if index < full:
                    self._space.pools[group].name(block, keys[index], stamp)
        sequence.unproven = [entry for entry in sequence.unproven if entry[1] >= full]
        sequence.proven_blocks = full

    def disown(self, sequence: Sequence) -> None:
        """The sequence's KV turned out to be bad: nothing that it computed itself can be found again."""
        for key in sequence.keys[sequence.hit_blocks :]:
            for pool in self._space.pools:
                block = pool.by_key.get(key)
                if block is not None:
                    pool.forget(block)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose blocks can be found, by the group that holds most."""
        return max(len(pool.by_key) for pool in self._space.pools) * self._space.block_tokens


def _images_within(request: GenerationRequest, start: int, end: int) -> bytes:
    """What tells the images apart whose tokens lie in the positions from `start` to `end`; empty where there are none."""
    places = (f"{image.digest}@{image.start};" for image in request.images if image.start < end and image.end > start)
    return "".join(places).encode()
