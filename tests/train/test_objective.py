"""What a pass minimises: segments lose nothing of the loss, a teacher pulls, parts add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.models.attention import DenseAttend, SegmentAttend
from service.models.build import build, init_weights
from service.models.decoder import Decoder
from service.train.objective import Batch, Distilled, NextToken, Segmented, sequence_loss
from service.types.catalog import V1_0, Shape
from service.types.model_spec import ModelSpec

SHAPE = Shape(vocab_size=37, dim=16, layers=3, heads=4, kv_heads=2, mlp_hidden=24, context_tokens=64)
LENGTH = 24


def spec_with(window: int | None) -> ModelSpec:
    """The middle layer sees a window."""
    spec = V1_0.spec(SHAPE)
    windowed = replace(spec.layers[1], attention=replace(spec.layers[1].attention, window=window))
    return replace(spec, layers=(spec.layers[0], windowed, spec.layers[2]))


def decoder_of(spec: ModelSpec, seed: int = 0) -> Decoder:
    decoder = build(spec, "cpu", torch.float32)
    init_weights(decoder, seed)
    return decoder


def batch_of(sequences: int, length: int = LENGTH) -> Batch:
    rows = torch.randint(0, 37, (sequences, length + 1), generator=torch.Generator().manual_seed(sequences))
    return Batch(rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1), length)


def total(objective: NextToken | Segmented | Distilled, model: Decoder, batch: Batch) -> float:
    return sum(float(part.detach()) for part in objective.parts(model, batch))


@settings(deadline=None, max_examples=25)
@given(segment=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), window=st.sampled_from([None, 1, 5, 9, 40]), sequences=st.integers(1, 3))
def test_segments_over_carried_memory_give_the_loss_of_one_pass(segment: int, window: int | None, sequences: int) -> None:
    model, batch = decoder_of(spec_with(window)), batch_of(sequences)
    assert total(Segmented(segment), model, batch) == pytest.approx(total(NextToken(), model, batch), rel=1e-5)


def test_the_gradient_stays_within_a_segment() -> None:
    spec = spec_with(None)
    attend = SegmentAttend(1, 4, spec.layers)
    inputs = [torch.randn(4, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    attend(0, *inputs)
    attend.advance()
    later = [torch.randn(4, heads, 4, requires_grad=True) for heads in (4, 2, 2)]
    attend(0, *later).sum().backward()
    assert all(tensor.grad is None for tensor in inputs) and all(tensor.grad is not None for tensor in later)


def test_memory_is_bounded_where_asked() -> None:
    model, batch = decoder_of(spec_with(None)), batch_of(1)
    bounded = total(Segmented(4, memory_tokens=4), model, batch)
    assert bounded != pytest.approx(total(NextToken(), model, batch), rel=1e-5)
    assert total(Segmented(4, memory_tokens=LENGTH), model, batch) == pytest.approx(total(NextToken(), model, batch), rel=1e-5)


def test_segments_keep_a_segments_activations_alone() -> None:
    model, batch = decoder_of(spec_with(None)), batch_of(2)

    def kept(objective: NextToken | Segmented) -> int:
        most = 0
        parts = objective.parts(model, batch)
        while True:
            sizes: list[int] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda x: x)
            with hooks:
                part = next(parts, None)
            if part is None:
                return most
            part.backward()
            most = max(most, sum(sizes))

    assert kept(Segmented(4)) < 0.5 * kept(NextToken())


def test_checkpointed_layers_read_the_memory_of_their_own_segment() -> None:
    batch = batch_of(1)
    gradients = []
    for recompute in (False, True):
        model = decoder_of(spec_with(5))
        model.gradient_checkpointing_enable(recompute)
        for part in Segmented(6).parts(model, batch):
            part.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_teacher_equal_to_the_student_adds_nothing() -> None:
    model, batch = decoder_of(spec_with(None)), batch_of(2)
    alone = float(sequence_loss(model, *batch).detach())
    assert total(Distilled(model, 0.25, 0.25, 2.0), model, batch) == pytest.approx(0.5 * alone, rel=1e-5)


def test_the_distance_to_a_teacher_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    given_, wanted = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    targets = torch.tensor([0, 3, 6, 1, 1])
    heat = 1.7
    student, teacher = ((rows.double() / heat).softmax(-1) for rows in (given_, wanted))
    divergence = (teacher * (teacher.log() - student.log())).sum() * heat**2
    centred = [rows.double() - rows.double().mean(-1, keepdim=True) for rows in (given_, wanted)]
    squared = ((centred[0] - centred[1]) ** 2).mean(-1).sum()
    hard = -given_.double().log_softmax(-1)[torch.arange(5), targets].sum()
    objective = Distilled(decoder_of(spec_with(None)), 0.3, 0.2, heat)
    assert float(objective.loss(given_, wanted, targets)) == pytest.approx(float(0.5 * hard + 0.3 * divergence + 0.2 * squared), rel=1e-5)
    assert float(objective.loss(given_ + 3.0, wanted, targets)) == pytest.approx(float(objective.loss(given_, wanted, targets)), rel=1e-4)


def test_the_teacher_gets_no_gradient_and_pulls_the_student() -> None:
    teacher, student, batch = decoder_of(spec_with(None), 1), decoder_of(spec_with(None), 2), batch_of(2)
    objective = Distilled(teacher, 0.5, 0.5, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        (part,) = objective.parts(student, batch)
        part.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(part.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_one_segment_equals_dense_attention_bit_for_bit() -> None:
    spec = spec_with(3)
    tensors = [torch.randn(2 * LENGTH, heads, 4, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    for layer in range(3):
        dense = DenseAttend(2, LENGTH, spec.layers)(layer, *tensors)
        assert torch.equal(dense, SegmentAttend(2, LENGTH, spec.layers)(layer, *tensors))
