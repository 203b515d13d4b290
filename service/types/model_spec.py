"""What a network is, as data: shapes, attention of every layer, positions, precision, cache layout and cost.

Every layer has its own spec, so windows, head counts, MLP kinds and caches may differ from layer to layer; a new kind of attention or
MLP is a new
dataclass in the union, not a new model class. It does not know tensors, files or devices.
Invariant: everything countable (parameters, bytes kept, FLOPs) is computed here from the few stored numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby

from service.types.kv_layout import BLOCK_TOKENS, FIRST_STAGE, SECOND_STAGE, FarSpec, FarStore, KvGroup, KvLayout
from service.types.vision import FusionSpec, VisionSpec

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}


class RopeScaling(Enum):
    """How rotary frequencies are stretched beyond the trained context (names as in Hugging Face configs)."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021). `original_context` is the context trained before scaling, in tokens."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling = RopeScaling.DEFAULT
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Multi-head attention with shared K/V heads (Ainslie et al. 2023). `window` counts the visible tokens, the query's own included;
    None is all. With `far` the window reaches back to the start of its first block, and what lies behind it is chosen by blocks.

    `gate`: dynamic attention: each head's output is multiplied by sigmoid(x · w_head + b_head), x being the layer's normalised input.
    `scale` None means head_dim ** −0.5.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    gate: bool = False
    scale: float | None = None
    softcap: float | None = None
    far: FarSpec | None = None

    def tokens_seen(self, context_tokens: float) -> tuple[float, float]:
        """Tokens that a query at the end of a context reads: near ones, and far ones."""
        if self.window is None:
            return context_tokens, 0.0
        sinks = 0 if self.far is None else self.far.sink_blocks * BLOCK_TOKENS
        near = min(context_tokens, self.window + sinks)
        budget = 0 if self.far is None else self.far.budget(int(context_tokens)) * BLOCK_TOKENS
        return near, min(context_tokens - near, budget)

    def bytes_seen(self, context_tokens: float, kv_bytes: int) -> float:
        """Bytes of cache that such a query reads: entries, scales, and the bounds and keys that far blocks are chosen by."""
        near, chosen = self.tokens_seen(context_tokens)
        size = near * 2 * self.head_dim * kv_bytes
        if self.far is not None and chosen:
            store, parts = self.far.store, BLOCK_TOKENS // self.far.sub_block_tokens
            value_bytes = {FarStore.INT8: 1.0, FarStore.INT4: 0.5}.get(store, float(kv_bytes))
            candidates = context_tokens - near
            # Keys are read of all that the last stage compares, values of the chosen.
            read = chosen + min(candidates, SECOND_STAGE * chosen)
            size += read * (self.head_dim * value_bytes + (0 if store is FarStore.NATIVE else 2))
            compared = candidates + parts * min(candidates, FIRST_STAGE * chosen)
            size += compared / BLOCK_TOKENS * (2 * self.head_dim + 2)
        return size * self.kv_heads


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    hidden: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. Both fields are open to further kinds (latent attention, mixtures of experts)."""

    attention: GroupedQueryAttention
    mlp: DenseMlp


@dataclass(frozen=True, slots=True)
class SharingSpec:
    """Cross-layer weight sharing: layer i computes with the attention and feed-forward weights of layer `owners[i]` ≤ i.

    Norms before the sublayers stay each layer's own, and so does every layer's K/V cache: shared weights are not a shared cache.
    """

    owners: tuple[int, ...]

    @classmethod
    def runs(cls, layers: int, length: int) -> SharingSpec:
        """Every `length` consecutive layers share one set of weights."""
        return cls(tuple(index // length * length for index in range(layers)))


@dataclass(frozen=True, slots=True)
class PrecisionSpec:
    """Which type each kind of arithmetic uses. `compute` is the type of weights and activations when served (`auto`: what the device
    computes fast).

    `quantize` (none, int8, int4) is what becomes of the weights when they are loaded to serve. `train_compute` is the autocast type in
    training; `loss_scaling` applies when that is float16. Norms, softmax, log-probs and master weights are float32.
    """

    compute: str = "auto"
    quantize: str = "none"
    train_compute: str = "float32"
    loss_scaling: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder. `context_tokens` is the longest sequence it accepts, `end_ids` the tokens that end a text.

    With `vision` it reads images: the token `image_id` marks each of their places, and `fusion` says how they are mixed in. With
    `sharing` layers compute with weights of other layers.
    """

    family: str
    vocab_size: int
    dim: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    context_tokens: int
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    precision: PrecisionSpec = PrecisionSpec()
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    line: str | None = None
    vision: VisionSpec | None = None
    fusion: FusionSpec | None = None
    image_id: int | None = None
    sharing: SharingSpec | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a prompt may hold."""
        return ("text",) if self.vision is None else ("text", "image")

    def kv_layout(self, block_tokens: int = BLOCK_TOKENS) -> KvLayout:
        """Group the layers by cache shape and window, in order of first appearance; a far group follows its near group."""

        def shape(index: int) -> tuple[int, int, int, int | None, FarSpec | None]:
            attention = self.layers[index].attention
            return attention.kv_heads, attention.head_dim, attention.head_dim, attention.window, attention.far

        kinds: dict[tuple[int, int, int, int | None, FarSpec | None], list[int]] = {}
        for index in range(len(self.layers)):
            kinds.setdefault(shape(index), []).append(index)
        groups: list[KvGroup] = []
        for (kv_heads, key_dim, value_dim, window, far), members in kinds.items():
            stem = "full" if window is None else f"window{window}" if far is None else f"near{window}"
            group = KvGroup(_unused(stem, groups), tuple(members), kv_heads, key_dim, value_dim, window, far)
            groups.append(group)
            if far is not None and far.store is not FarStore.EVICT:
                groups.append(replace(group, name=_unused(f"far_{far.store.value}", groups), source=len(groups) - 1))
        return KvLayout(tuple(groups), block_tokens)

    @property
    def parameters(self) -> int:
        """Stored parameters; tied embeddings count once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        seeing = sum(part.parameters(self.dim) for part in (self.vision, self.fusion) if part is not None)
        borrowed = sum(_layer_parameters(layer, self.dim) - 2 * self.dim for layer in self._borrowing_layers())
        layers = sum(count * _layer_parameters(layer, self.dim) for layer, count in self._layer_runs())
        return embeddings + self.dim + seeing + layers - borrowed

    @property
    def matmul_parameters(self) -> int:
        """Parameters in a matrix product for every token (the output head, not the input embedding or what only images need).

        Weights that layers share are multiplied with once for each of these layers.
        """
        return self.vocab_size * self.dim + sum(count * _layer_matmul_parameters(layer, self.dim) for layer, count in self._layer_runs())

    @property
    def matmul_parameters_read(self) -> int:
        """The same with shared weights counted once: what a step must read at least."""
        return self.matmul_parameters - sum(_layer_matmul_parameters(layer, self.dim) for layer in self._borrowing_layers())

    def owner(self, index: int) -> int:
        """The layer whose weights layer `index` computes with: itself unless they are shared."""
        return index if self.sharing is None else self.sharing.owners[index]

    def flops(self, tokens: int, context_tokens: float, sampled: int | None = None) -> float:
        """FLOPs of computing `tokens` positions that see `context_tokens` each on average; the head runs on `sampled` rows (all by
        default)."""
        head = self.vocab_size * self.dim
        rows = tokens if sampled is None else sampled
        linear = 2.0 * tokens * (self.matmul_parameters - head) + 2.0 * rows * head
        return linear + 4.0 * tokens * self._attention_width(context_tokens)

    def image_flops(self, tokens: int) -> float:
        """FLOPs of making the `tokens` image tokens of one image, before any decoder layer."""
        return sum(
            (
                self.vision.flops(tokens, self.dim) if self.vision is not None else 0.0,
                self.fusion.image_flops(tokens, self.dim) if self.fusion is not None else 0.0,
            )
        )

    def image_token_values(self) -> int:
        """Numbers that a worker keeps for one image token beside the KV cache.

        They are its embedding, and its keys and values for the fusion, once by themselves and once joined for a sequence.
        """
        if self.vision is None:
            return 0
        return self.dim + (4 * self.fusion.kv_width if self.fusion is not None else 0)

    def bytes_read(self, sequences: int, context_tokens: float, weight_bytes: int, kv_bytes: int) -> float:
        """Bytes a decode step of `sequences` must read at least: the matmul weights once and every visible K/V entry once."""
        visible = sum(count * layer.attention.bytes_seen(context_tokens, kv_bytes) for layer, count in self._layer_runs())
        return float(self.matmul_parameters_read * weight_bytes) + sequences * visible

    def _attention_width(self, context_tokens: float) -> float:
        total = 0.0
        for layer, count in self._layer_runs():
            attention = layer.attention
            total += count * attention.heads * attention.head_dim * sum(attention.tokens_seen(context_tokens))
        return total

    def _borrowing_layers(self) -> list[LayerSpec]:
        return [] if self.sharing is None else [layer for index, layer in enumerate(self.layers) if self.sharing.owners[index] != index]

    def _layer_runs(self) -> list[tuple[LayerSpec, int]]:
        return [(layer, len(list(run))) for layer, run in groupby(self.layers)]


def _unused(stem: str, groups: list[KvGroup]) -> str:
    """`stem`, or a name made of it where a group has that name already."""
    return stem if all(group.name != stem for group in groups) else f"{stem}_{len(groups)}"


def _layer_matmul_parameters(layer: LayerSpec, dim: int) -> int:
    attention = layer.attention
    query, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    gate = dim * attention.heads if attention.gate else 0
    return dim * (query + 2 * kv) + query * dim + gate + 3 * dim * layer.mlp.hidden


def _layer_parameters(layer: LayerSpec, dim: int) -> int:
    attention = layer.attention
    query, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    vectors = 2 * dim
    vectors += (query + 2 * kv) if attention.qkv_bias else 0
    vectors += dim if attention.out_bias else 0
    vectors += 2 * attention.head_dim if attention.qk_norm else 0
    vectors += attention.heads if attention.gate else 0
    vectors += (2 * layer.mlp.hidden + dim) if layer.mlp.bias else 0
    return _layer_matmul_parameters(layer, dim) + vectors
