"""Continue a prompt with a model in training, for people to judge: the whole text is computed anew for every token, no cache.

It does not know serving; the engine's sampler is another room's. Invariant: the same weights, ids and seed give the same continuation.
"""

from __future__ import annotations

import torch

from service.models.attention import DenseAttend
from service.models.decoder import Decoder


@torch.no_grad()
def continue_ids(model: Decoder, ids: list[int], tokens: int, temperature: float, seed: int) -> list[int]:
    """At most `tokens` further ids, fewer when an end token comes first (it is not returned). `temperature` 0 takes the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    row = list(ids)
    for _ in range(min(tokens, model.spec.context_tokens - len(row))):
        inputs = torch.tensor(row, device=device)
        last = torch.tensor([len(row) - 1], device=device)
        logits = model(inputs, torch.arange(len(row), device=device), DenseAttend(1, len(row), model.spec.layers), last)[0].float().cpu()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if chosen in model.spec.end_ids:
            break
        row.append(chosen)
    return row[len(ids) :]
