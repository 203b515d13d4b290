"""What `gpu_bench` measures of layers around attention: of each kernel some shapes, the bytes and operations it cannot do without, and who
else computes the same.

It does not know clocks or rows. Invariant: a case is made when it is asked for, and its tensors are gone with it; the bytes that it counts
are those of inputs that the kernel reads, once, and of results, but for tables and other integers (tests count them by address).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, the bytes it must move and the operations it must do, and who else computes the same."""

    op: str
    shape: dict[str, Any]
    run: Callable[[], Any]
    moved_bytes: float
    flops: float
    # Of the machine's rates the one that its operations are held against.
    rate: str = "flops_us"
    # Each makes what is timed, so that one that cannot be made is a row too.
    peers: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Place:
    """Where cases are made, and the type of their activations."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def drawn(self, *shape: int) -> Tensor:
        """Random values of the activations' type."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


GPU = Place()


def linear_case(place: Place, op: str, rows: int, outputs: int, inputs: int) -> Case:
    """A product with an int8 weight or, of one tile for any number of rows, in the type of the activations, beside torch's product."""
    from service.kernels.gpu import int8_linear, ordered_linear

    x, plain, size = place.drawn(rows, inputs), place.drawn(outputs, inputs), place.dtype.itemsize
    shape, around = {"rows": rows, "outputs": outputs, "inputs": inputs}, size * rows * (inputs + outputs)
    peers = {"torch_16_bits": partial(partial, torch.matmul, x, plain.t())}
    if op == "ordered_linear":
        run, rate, moved = partial(ordered_linear.ordered_linear, x, plain), "flops_us", plain.nbytes + around
    else:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=place.device)
        scales = torch.rand(outputs, device=place.device) / 127
        run, moved = partial(getattr(int8_linear, op), x, weight, scales), weight.nbytes + scales.nbytes + around
        rate = "int8_us" if op == "int8_linear" else "flops_us"
    return Case(op, shape, run, moved, 2.0 * rows * outputs * inputs, rate, peers)


def linear_cases() -> Iterator[Case]:
    """Products of two shapes for one row to many."""
    for outputs, inputs in ((14336, 4096), (4096, 14336)):
        for rows in (1, 16, 256, 1024, 4096):
            for op in ("int8_linear", "weight_only_linear", "ordered_linear"):
                yield linear_case(GPU, op, rows, outputs, inputs)


def elementwise_case(place: Place, op: str, rows: int, heads: int, size: int) -> Case:
    """One pass over memory, beside torch's."""
    from service.kernels import elementwise as plain
    from service.kernels.gpu import elementwise as ours

    width = heads * size
    x, weight, phase = place.drawn(rows, width), place.drawn(width), torch.rand(rows, size // 2, device=place.device)
    arguments: tuple[Any, ...] = {
        "rms_norm": (x, weight, 1e-6),
        "add_rms_norm": (x, place.drawn(rows, width), weight, 1e-6),
        "rotate": (x.view(rows, heads, size), phase.cos(), phase.sin()),
        "swiglu": (place.drawn(rows, 7 * width),),
        "head_gate": (x.view(rows, heads, size), place.drawn(rows, heads)),
    }[op]
    results = {"add_rms_norm": 2 * x.nbytes, "swiglu": arguments[0].nbytes // 2}.get(op, x.nbytes)
    moved = results + sum(tensor.nbytes for tensor in arguments if isinstance(tensor, Tensor))
    beside = partial(partial, getattr(plain, op), *arguments)
    return Case(op, {"rows": rows}, partial(getattr(ours, op), *arguments), moved, 0.0, peers={"torch": beside})


def elementwise_cases() -> Iterator[Case]:
    """Layers 4096 wide, and 14336 inside, for few rows and many."""
    for rows in (32, 8192):
        for op in ("rms_norm", "add_rms_norm", "rotate", "swiglu", "head_gate"):
            yield elementwise_case(GPU, op, rows, 32, 128)


def write_case(place: Place, rows: int, heads: int, kv_heads: int, size: int) -> Case:
    """Rotation of query and key heads and the write of keys and values, beside the same in two launches."""
    from service.kernels.gpu import elementwise, kv_store

    fused_heads, phase = place.drawn(rows, heads + 2 * kv_heads, size), torch.rand(rows, size // 2, device=place.device)
    turned_heads, value, angles = fused_heads[:, :-kv_heads], fused_heads[:, -kv_heads:], (phase.cos(), phase.sin())
    blocks = torch.zeros(2, rows // 64 + 2, kv_heads, 64, size, device=place.device, dtype=place.dtype)
    at = torch.arange(rows, device=place.device)
    places = *blocks, at // 64 + 1, at % 64

    def apart() -> Tensor:
        turned = elementwise.rotate(turned_heads, *angles)
        kv_store.write_kv(turned[:, heads:], value, *places)
        return turned[:, :heads]

    run = partial(kv_store.rotate_write, turned_heads, value, *angles, *places)
    return Case(
        "rotate_write", {"rows": rows}, run, 2.0 * fused_heads.nbytes + 2 * phase.nbytes, 0.0, peers={"two launches": lambda: apart}
    )


def write_cases() -> Iterator[Case]:
    """32 query heads and 8 of keys and values, for few rows and many."""
    for rows in (32, 8192):
        yield write_case(GPU, rows, 32, 8, 128)


def image_case(place: Place, rows: int, heads: int, kv_heads: int, size: int, images: int) -> Case:
    """Rows of a sequence that all see its image tokens, beside torch's einsum and softmax."""
    from service.kernels import cross_attention as plain
    from service.kernels.gpu import cross_attention as ours

    query, keys, values = place.drawn(rows, heads, size), place.drawn(images, kv_heads, size), place.drawn(images, kv_heads, size)
    arguments = query, keys, values, None, size**-0.5
    moved, flops = 2.0 * query.nbytes + 2 * keys.nbytes, 4.0 * rows * heads * images * size
    shape = {"rows": rows, "images": images, "size": size}
    beside = partial(partial, plain.attend_images, *arguments)
    return Case("attend_images", shape, partial(ours.attend_images, *arguments), moved, flops, peers={"torch": beside})


def image_cases() -> Iterator[Case]:
    """16 query heads and 4 of keys and values; a decoding row and a prompt's slice, behind one image and behind several."""
    for rows, images in product((1, 512), (64, 1024)):
        yield image_case(GPU, rows, 16, 4, 64, images)


def sample_case(place: Place, rows: int, vocabulary: int, top_k: int, top_p: float) -> Case:
    """One token a row, beside torch with a sort. The limit is one pass over the logits, whatever is filtered."""
    from service.kernels import reference_sampling
    from service.kernels.gpu import sampling

    logits = place.drawn(rows, vocabulary) * 3
    temperature, min_p = (torch.full((rows,), number, device=place.device) for number in (0.8, 0.0))
    kept = torch.full((rows,), top_k, dtype=torch.int64, device=place.device)
    nucleus = torch.full((rows,), top_p, dtype=torch.float64, device=place.device)
    numbers = torch.rand(rows, dtype=torch.float64, device=place.device)
    arguments = (logits, temperature, kept, nucleus, min_p, numbers, 1e-5)
    columns = sum(tensor.nbytes for tensor in (temperature, min_p, nucleus, numbers))
    shape = {"rows": rows, "vocabulary": vocabulary, "top_k": top_k, "top_p": top_p}
    beside = partial(partial, reference_sampling.sample, *arguments)
    return Case("sample", shape, partial(sampling.sample, *arguments), logits.nbytes + columns, 0.0, peers={"torch_sort": beside})


def sample_cases() -> Iterator[Case]:
    """A vocabulary of 128,256 for one row to many, without filters and with both."""
    for rows in (1, 32, 256):
        for top_k, top_p in ((0, 1.0), (50, 0.95)):
            yield sample_case(GPU, rows, 128_256, top_k, top_p)


def check(run: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Refuse to time what is wrong: `other` gives [B, H, L, D]."""
    found = run()
    expected = other().transpose(1, 2).reshape(found.shape)
    error = (found.float() - expected.float()).abs().max().item()
    if not error <= 0.02 * expected.float().abs().max().item():
        raise ValueError(f"a result is off by {error:.3g}: run make gpu-check")


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "linear": linear_cases,
    "elementwise": elementwise_cases,
    "write": write_cases,
    "images": image_cases,
    "sample": sample_cases,
}
