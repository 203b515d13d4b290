"""What this machine can do at most, measured in a few hundredths of a second: bytes read from memory and operations of a matrix product.

It does not know models. The share of the limit that dashboards show is the model's own cost over these two numbers. Invariant: the best of
the rounds counts, since whatever else the machine does only makes a round slower; nothing measured stays in memory.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from service.kernels.dispatch import resolve
from service.kernels.quantised import quantise_weight

ROUNDS = 3
# Larger than the last cache of a core, small enough to be touched in a moment.
_CPU_BYTES, _CPU_WIDTH = 96 << 20, 768
_CUDA_BYTES, _CUDA_WIDTH = 1 << 30, 8192


def machine_limits(
    device: torch.device, dtype: torch.dtype, given: tuple[float, float], quantize: str = "none"
) -> tuple[tuple[str, float], ...]:
    """(kind, a second) for `bytes` and `flops`; what is `given` is taken as it is, what is 0 is measured on `device` in `dtype`.

    Where weights are quantised, `flops` are operations of a product with int8 weights.
    """
    read, computed = given
    measured = computed or (flops_a_second(device, dtype) if quantize == "none" else int8_operations_a_second(device, dtype))
    return ("bytes", read or bytes_a_second(device)), ("flops", measured)


@torch.inference_mode()
def bytes_a_second(device: torch.device) -> float:
    """Bytes a second: a sum over a large tensor on a CPU; on a GPU a copy, whose reads and writes both count."""
    if device.type == "cpu":
        # Not zeros: untouched memory of the operating system is one page that is read again and again.
        numbers = torch.ones(_CPU_BYTES // 4)
        return numbers.nbytes / _best(numbers.sum, device)
    source = torch.zeros(_CUDA_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


@torch.inference_mode()
def flops_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product in `dtype`, by the implementation that the layers use or, where it is faster, torch's own."""
    width = _CPU_WIDTH if device.type == "cpu" else _CUDA_WIDTH
    left = torch.full((width, width), 0.5, dtype=dtype, device=device)
    right = torch.full((width, width), 0.25, dtype=dtype, device=device)
    products = [resolve("linear", device, dtype)]
    if dtype is not torch.float32:  # torch's own 16-bit product may be the faster one, its float32 product on a CPU never is.
        products.append(torch.mm)
    return 2.0 * width**3 / min(_best(functools.partial(product, left, right), device) for product in products)


@torch.inference_mode()
def int8_operations_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product with int8 weights, by the implementation that the layers use."""
    width = _CPU_WIDTH if device.type == "cpu" else _CUDA_WIDTH
    weight = quantise_weight(torch.full((width, width), 0.25), "int8")
    product = resolve("pack_quantised", device, dtype)(weight)
    rows = torch.full((width, width), 0.5, dtype=dtype, device=device)
    return 2.0 * width**3 / _best(lambda: product.apply(rows), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some rounds, after one that warms up."""
    seconds = []
    for _ in range(1 + ROUNDS):
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began_s)
    return max(min(seconds[1:]), 1e-9)
