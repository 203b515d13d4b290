"""The GPU's norms, rotation, SwiGLU and gate against the float64 reference: types, odd sizes, views; the comparison is shown to bite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from service.kernels import reference
from service.kernels.gpu import elementwise
from tests.kernels.gpu.conftest import DEVICE, DTYPES, check_error


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    phase = torch.rand(tokens, half) * 6
    return phase.cos(), phase.sin()


CASES: dict[str, Any] = {
    "rms_norm": lambda: (torch.randn(7, 40) * 3, torch.randn(40), 1e-6),
    "rms_norm wide": lambda: (torch.randn(3, 5000) * 3, torch.randn(5000), 1e-6),
    "rms_norm heads": lambda: (torch.randn(7, 5, 40)[:, 1:4], torch.randn(40), 1e-5),
    "rms_norm copied": lambda: (torch.randn(40, 7).T, torch.randn(40), 1e-5),
    "add_rms_norm": lambda: (torch.randn(7, 40), torch.randn(7, 40) * 3, torch.randn(40), 1e-6),
    "rotate": lambda: (torch.randn(7, 3, 16), *angles(7, 8)),
    "rotate view": lambda: (torch.randn(7, 9, 80)[:, 2:5], *angles(7, 40)),
    "rotate part": lambda: (torch.randn(7, 3, 24), *angles(7, 5)),
    "apply_rope": lambda: (torch.randn(7, 6, 16), torch.randn(7, 2, 16), *angles(7, 8)),
    "swiglu": lambda: (torch.randn(7, 46) * 3,),
    "swiglu wide": lambda: (torch.randn(2, 2 * 2500),),
    "head_gate": lambda: (torch.randn(7, 3, 16), torch.randn(7, 3)),
}


def results(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def computed(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    placed = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
    return tuple(result.cpu() for result in results(getattr(elementwise, name.split(maxsplit=1)[0])(*placed)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    exact = getattr(reference, name.split(maxsplit=1)[0])
    turned = name.startswith(("rotate", "apply"))
    made = CASES[name]()
    # Angles stay in float32, as the models keep them.
    arguments = tuple(a.to(dtype) if isinstance(a, Tensor) and not (turned and a.dim() == 2) else a for a in made)
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    actual = computed(name, arguments)
    expected = results(exact(*(a.double() if isinstance(a, Tensor) else a for a in arguments)))
    plain = results(exact(*(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments)))
    for one, wide, narrow in zip(actual, expected, plain, strict=True):
        check_error(one, wide, narrow, dtype)
    assert all(torch.equal(a, b) for a, b in zip((a for a in arguments if isinstance(a, Tensor)), before, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_percent_off_is_noticed(name: str) -> None:
    arguments = CASES[name]()
    exact = results(getattr(reference, name.split(maxsplit=1)[0])(*(a.double() if isinstance(a, Tensor) else a for a in arguments)))
    with pytest.raises(AssertionError):
        check_error(computed(name, arguments)[0] * 1.02, exact[0], exact[0].float(), torch.float32)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rotate", "swiglu", "head_gate"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(name: str) -> None:
    arguments = CASES[name]()
    rows = arguments[0].shape[0]
    alone = tuple(a[3:4] if isinstance(a, Tensor) and a.shape[0] == rows else a for a in arguments)
    for one, many in zip(computed(name, alone), computed(name, arguments), strict=True):
        assert torch.equal(one, many[3:4])


def test_no_rows_give_no_rows() -> None:
    weight = torch.ones(8, device=DEVICE)
    nothing = torch.zeros(0, 8, device=DEVICE)
    assert elementwise.rms_norm(nothing, weight, 1e-6).shape == (0, 8)
    assert elementwise.add_rms_norm(nothing, nothing, weight, 1e-6)[1].shape == (0, 8)
    assert elementwise.swiglu(nothing).shape == (0, 4)
    assert elementwise.rotate(nothing[:, None], nothing[:, :4], nothing[:, :4]).shape == (0, 1, 8)
    assert elementwise.head_gate(nothing[:, None], nothing[:, :1]).shape == (0, 1, 8)
