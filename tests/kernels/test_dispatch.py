"""The table of implementations: choice, fallback, force, record and counts."""

from __future__ import annotations

import inspect

import pytest
import torch

from service.kernels import dispatch, linear, reference
from service.kernels.choices import Dispatch, DispatchError, Implementation, Place
from service.kernels.dispatch import TABLE
from service.kernels.native import binding
from service.kernels.native import linear as native_linear


def only_cpu(place: Place) -> str | None:
    return None if place.device == "cpu" else "it runs on a CPU only"


SMALL = {"twice": (Implementation("fast", lambda x: x + x, only_cpu), Implementation("plain", lambda x: 2 * x, lambda place: None))}


def test_the_first_that_can_is_chosen_and_recorded() -> None:
    choices = Dispatch(SMALL)
    assert choices.resolve("twice", "cpu", torch.float32)(3) == 6
    choices.resolve("twice", torch.device("cuda", 1), torch.float16)
    assert choices.chosen() == {"twice[cpu,float32]": "fast", "twice[cuda,float16]": "plain"}


def test_the_choice_is_made_once() -> None:
    choices = Dispatch(SMALL)
    assert choices.resolve("twice", "cpu", torch.float32) is choices.resolve("twice", "cpu", torch.float32)


def test_counts_are_taken_once() -> None:
    choices = Dispatch(SMALL)
    fast, plain = choices.resolve("twice", "cpu", torch.float32), choices.resolve("twice", "cuda", torch.float32)
    assert choices.take_counts() == {}
    fast(1), fast(2), plain(3)
    assert choices.take_counts() == {("twice", "fast"): 2, ("twice", "plain"): 1}
    assert choices.take_counts() == {}


def test_a_forced_choice_holds_until_it_is_lifted() -> None:
    choices = Dispatch(SMALL)
    choices.force("twice", "plain")
    choices.resolve("twice", "cpu", torch.float32)
    assert choices.chosen() == {"twice[cpu,float32]": "plain"}
    choices.force("twice", None)
    choices.resolve("twice", "cpu", torch.float32)
    assert choices.chosen() == {"twice[cpu,float32]": "fast"}


def test_a_forced_choice_that_cannot_hold_raises() -> None:
    choices = Dispatch(SMALL)
    choices.force("twice", "fast")
    with pytest.raises(DispatchError, match="twice: fast was asked for, but it runs on a CPU only"):
        choices.resolve("twice", "cuda", torch.float32)


def test_unknown_names_list_what_there_is() -> None:
    choices = Dispatch(SMALL)
    with pytest.raises(DispatchError, match="fast, plain"):
        choices.force("twice", "faster")
    with pytest.raises(DispatchError, match="twice"):
        choices.resolve("thrice", "cpu", torch.float32)


@pytest.mark.parametrize("operation", TABLE)
def test_everything_resolves_on_a_cpu_in_every_type(operation: str) -> None:
    choices = Dispatch(TABLE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert callable(choices.resolve(operation, "cpu", dtype))


@pytest.mark.parametrize("operation", [name for name in TABLE if hasattr(reference, name)])
def test_implementations_take_the_arguments_of_the_reference(operation: str) -> None:
    expected = list(inspect.signature(getattr(reference, operation)).parameters)
    for implementation in TABLE[operation]:
        assert list(inspect.signature(implementation.kernel).parameters) == expected


def test_sixteen_bits_never_reach_the_float32_product() -> None:
    choices = Dispatch(TABLE)
    choices.force("linear", "onednn")
    with pytest.raises(DispatchError, match="float32 only"):
        choices.resolve("linear", "cpu", torch.bfloat16)


def test_without_onednn_the_next_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_onednn", lambda: False)
    monkeypatch.setattr(native_linear, "slower", lambda dtype: "as on another machine")
    choices = Dispatch(TABLE)
    packed = choices.resolve("pack_linear", "cpu", torch.float32)(torch.eye(3))
    choices.resolve("linear", "cpu", torch.float32)
    assert choices.chosen() == {"linear[cpu,float32]": "torch", "pack_linear[cpu,float32]": "plain"}
    assert torch.equal(packed.apply(torch.ones(1, 3)), torch.ones(1, 3))


def test_one_order_of_sums_is_taken_where_it_is_faster_too() -> None:
    choices = Dispatch(TABLE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        choices.resolve("pack_linear", "cpu", dtype), choices.resolve("pack_small_linear", "cpu", dtype)
        fast = binding.absent() is None and native_linear.slower(dtype) is None
        kind = str(dtype).removeprefix("torch.")
        assert (choices.chosen()[f"pack_linear[cpu,{kind}]"] == "ordered") == fast
        assert choices.chosen()[f"pack_small_linear[cpu,{kind}]"] == ("ordered" if fast else "plain")


@pytest.mark.parametrize(
    ("units", "chosen"), [(True, {"linear": "torch", "pack_linear": "plain"}), (False, {"linear": "widened", "pack_linear": "widened"})]
)
def test_bfloat16_is_widened_only_where_the_cpu_cannot_multiply_it(
    units: bool, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "computes_bfloat16", lambda: units)
    monkeypatch.setattr(native_linear, "slower", lambda dtype: "as on another machine")
    choices = Dispatch(TABLE)
    for operation, name in chosen.items():
        choices.resolve(operation, "cpu", torch.bfloat16), choices.resolve(operation, "cpu", torch.float16)
        assert choices.chosen()[f"{operation}[cpu,bfloat16]"] == name
        assert choices.chosen()[f"{operation}[cpu,float16]"] == "widened"


def test_the_process_has_one_set_of_choices() -> None:
    function = dispatch.resolve("swiglu", "cpu", torch.float32)
    dispatch.take_counts()
    function(torch.zeros(1, 4))
    best = "torch" if binding.absent() else "native"
    assert dispatch.take_counts() == {("swiglu", best): 1}
    assert dispatch.chosen()["swiglu[cpu,float32]"] == best


@pytest.mark.parametrize("operation", [name for name, choices in TABLE.items() if any(choice.name == "triton" for choice in choices)])
def test_a_gpu_computes_with_triton_where_it_is_installed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton", lambda: True)
    choices = Dispatch(TABLE)
    choices.resolve(operation, "cuda", torch.bfloat16)
    assert choices.chosen() == {f"{operation}[cuda,bfloat16]": "triton"}
    choices.force(operation, "triton")
    with pytest.raises(DispatchError, match="on a GPU only, not on cpu"):
        choices.resolve(operation, "cpu", torch.float32)
    monkeypatch.setattr(dispatch, "_triton", lambda: False)
    with pytest.raises(DispatchError, match="triton is not installed"):
        choices.resolve(operation, "cuda", torch.float32)
    choices.force(operation, None)
    choices.resolve(operation, "cuda", torch.float32)
    assert choices.chosen()[f"{operation}[cuda,float32]"] != "triton"


@pytest.mark.parametrize("operation", [name for name, choices in TABLE.items() if any(choice.name == "triton" for choice in choices)])
def test_the_gpu_function_takes_the_arguments_of_the_reference(operation: str) -> None:
    pytest.importorskip("triton")
    call = next(choice.kernel for choice in TABLE[operation] if choice.name == "triton")
    found = inspect.getclosurevars(call).nonlocals["found"]()
    assert list(inspect.signature(found).parameters) == list(inspect.signature(call).parameters)
