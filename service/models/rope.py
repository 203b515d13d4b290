"""Rotary frequencies of every scaling kind, and the table of cosines and sines that a decoder reads rows from.

It does not know heads, layers or caches. Invariant: the row of a position is a function of that position alone, bit for bit: entries are
computed in tiles of fixed shape and from float64, so neither the batch nor the order of growth shows in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.types.model_spec import RopeScaling, RopeSpec

TILE_TOKENS = 1024


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians per token of every feature pair, [rotary_dim / 2] float32; for `dynamic`, those inside the original context."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    plain = 1.0 / (spec.theta**exponents)
    if spec.scaling is RopeScaling.LINEAR:
        return plain / spec.factor
    if spec.scaling is RopeScaling.LLAMA3:
        return _llama3(spec, plain)
    if spec.scaling is RopeScaling.YARN:
        return _yarn(spec, spec.theta**exponents)
    return plain


def attention_factor(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied by: 1 except for YaRN (Peng et al. 2023, section 3.4)."""
    if spec.scaling is not RopeScaling.YARN:
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return _yarn_scale(spec.factor, spec.mscale) / _yarn_scale(spec.factor, spec.mscale_all_dim)
    return _yarn_scale(spec.factor, 1.0)


class RopeTable:
    """Cosines and sines of positions 0 … context_tokens − 1, float32, computed when first needed and kept.

    Memory: 4 · rotary_dim bytes for each position reached.
    """

    def __init__(self, spec: RopeSpec, context_tokens: int) -> None:
        self._spec = spec
        self._context_tokens = context_tokens
        self._factor = attention_factor(spec)
        self._cos = self._sin = torch.empty(0, spec.rotary_dim // 2)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, rotary_dim / 2] float32 on the device of `positions` [tokens] int64, all below context_tokens."""
        if self._cos.device != positions.device or len(self._cos) < self._context_tokens:
            self._grow(positions)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self, positions: Tensor) -> None:
        """Reach the last position asked for; on an accelerator the whole context at once, so that steps never wait for a value."""
        reach = self._context_tokens
        if positions.device.type == "cpu":
            reach = int(positions.max()) + 1 if positions.numel() else 0
        if self._cos.device == positions.device and reach <= len(self._cos):
            return
        reach = min(max(reach, 2 * len(self._cos)), self._context_tokens)
        start = len(self._cos)
        with torch.inference_mode(False), torch.no_grad():
            angles = [self._angles(tile) for tile in range(start, reach, TILE_TOKENS)]
            cos = torch.cat([self._cos.cpu(), *((tile.cos() * self._factor).float() for tile in angles)])
            sin = torch.cat([self._sin.cpu(), *((tile.sin() * self._factor).float() for tile in angles)])
            self._cos, self._sin = cos.to(positions.device), sin.to(positions.device)

    def _angles(self, start: int) -> Tensor:
        """Angles of one tile of positions, [TILE_TOKENS, rotary_dim / 2] float64 (rounded as float32 products are)."""
        positions = torch.arange(start, start + TILE_TOKENS, dtype=torch.float32)[:, None]
        if self._spec.scaling is RopeScaling.DYNAMIC:
            return (positions * _dynamic(self._spec, positions + 1)).double()
        return (positions * inverse_frequencies(self._spec)).double()


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / plain
    low, high = spec.original_context / spec.low_freq_factor, spec.original_context / spec.high_freq_factor
    smooth = (spec.original_context / wavelengths - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    between = (1 - smooth) * plain / spec.factor + smooth * plain
    stretched = torch.where(wavelengths > low, plain / spec.factor, plain)
    return torch.where((wavelengths >= high) & (wavelengths <= low), between, stretched)


def _yarn(spec: RopeSpec, wavelengths: Tensor) -> Tensor:
    """YaRN, NTK by parts (Peng et al. 2023): pairs that turn often are kept, those that turn rarely divided by `factor`."""
    low, high = _turning_dim(spec, spec.beta_fast), _turning_dim(spec, spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (spec.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _turning_dim(spec: RopeSpec, turns: float) -> float:
    """The (fractional) dimension whose pair turns `turns` times within the original context."""
    return spec.rotary_dim * math.log(spec.original_context / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic(spec: RopeSpec, lengths: Tensor) -> Tensor:
    """NTK-aware frequencies for sequences of `lengths` [n, 1] tokens, [n, rotary_dim / 2]; unchanged inside the original context."""
    lengths = lengths.clamp(min=spec.original_context).double()
    growth = spec.factor * lengths / spec.original_context - (spec.factor - 1)
    theta = (spec.theta * growth ** (spec.rotary_dim / (spec.rotary_dim - 2))).float()
    return 1.0 / (theta ** (torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim))
