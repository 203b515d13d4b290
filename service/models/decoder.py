"""The decoder: embedding, layers, final norm and head over flat batches of tokens.

It knows neither caches nor sequences: positions, an `Attend` and the step's images arrive as arguments, and rotations are looked up once
per forward.
Invariant: parameter names are the names of our own checkpoint format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from service.kernels.native.decoder import BoundLayers, PagedStep
from service.models.attention import Attend, GroupedAttention
from service.models.fusion import GatedFusion, ImageContext
from service.models.layers import Computed, Embedding, Kernels, Linear, RmsNorm, SwigluMlp
from service.models.rope import RopeTable
from service.models.vision import PatchEncoder
from service.models.whole_layers import Sublayers, bind_layers
from service.types.model_spec import ModelSpec


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual stream.

    With an `owner` the layer has norms of its own and computes with that layer's weights; they are registered there and nowhere else.
    """

    def __init__(self, index: int, model: ModelSpec, owner: DecoderLayer | None, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RmsNorm(model.dim, model.norm_eps, device, dtype)
        self.mlp_norm = RmsNorm(model.dim, model.norm_eps, device, dtype)
        if owner is None:
            spec = model.layers[index]
            self.attention = GroupedAttention(spec.attention, model.dim, model.norm_eps, device, dtype)
            self.mlp = SwigluMlp(spec.mlp, model.dim, device, dtype)
            self.sublayers = (self.attention, self.mlp)
        else:
            self.sublayers = owner.sublayers

    @property
    def parts(self) -> Sublayers:
        """Norm and attention, norm and feed-forward, as the layer computes them."""
        return self.attention_norm, self.sublayers[0], self.mlp_norm, self.sublayers[1]

    def forward(self, update: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor]:
        """(pending update, residual) -> the same after this layer, all [T, dim]; the stream's value is their sum.

        Adding late lets one op do "add, then norm".
        """
        attention, mlp = self.sublayers
        x, residual = self.attention_norm.add(update, residual)
        x, residual = self.mlp_norm.add(attention(x, self.index, *rotation, attend), residual)
        return mlp(x), residual


class Decoder(Computed):
    """A causal decoder as `spec` describes it. Parameters are left uninitialised: load them or call `init_weights`."""

    def __init__(self, spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Embedding(spec.vocab_size, spec.dim, device, dtype)
        layers: list[DecoderLayer] = []
        for index in range(len(spec.layers)):
            owner = None if spec.owner(index) == index else layers[spec.owner(index)]
            layers.append(DecoderLayer(index, spec, owner, device, dtype))
        self.layers = nn.ModuleList(layers)
        self._recompute = False
        self._whole: BoundLayers | None = None
        self.norm = RmsNorm(spec.dim, spec.norm_eps, device, dtype)
        self.head = None if spec.tied_embeddings else Linear(spec.dim, spec.vocab_size, False, device, dtype)
        self.rope = RopeTable(spec.rope, spec.context_tokens)
        self.vision = PatchEncoder(spec.vision, spec.dim, spec.norm_eps, device, dtype) if spec.vision is not None else None
        self.fusion = GatedFusion(spec.fusion, spec.dim, spec.norm_eps, device, dtype) if spec.fusion is not None else None

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None, images: ImageContext | None = None
    ) -> Tensor:
        """Logits [R, vocab] of all T tokens, or only of the given `rows` [R] int64 of them.

        `tokens` [T] int64, `positions` [T] int64 below `context_tokens`; the logits have the compute dtype.
        """
        hidden = self.hidden(tokens, positions, attend, images)
        return self.logits(hidden if rows is None else hidden.index_select(0, rows))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        images: ImageContext | None = None,
        step: PagedStep | None = None,
    ) -> Tensor:
        """Final normalised states [T, dim]. `images`: what the step's sequences show and see (None: no images anywhere).

        With a `step`, which says where in the cache `attend` would read and write, all layers may be computed by one call.
        """
        rotation = self.rope.rows(positions)
        update = self.embed(tokens)
        if images is not None:
            update = update.index_copy(0, images.at, images.embeddings.to(update.dtype))
        residual = torch.zeros_like(update)
        whole = self._whole if images is None or self.fusion is None else None
        if step is None or whole is None or not self.kernels.decoder_layers(whole, update, residual, rotation, step):
            update, residual = self._each_layer(update, residual, rotation, attend, images)
        normed, _ = self.norm.add(update, residual)
        return normed

    def _each_layer(
        self, update: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, images: ImageContext | None
    ) -> tuple[Tensor, Tensor]:
        for index, layer in enumerate(self.layers):
            if images is not None and self.fusion is not None and index == self.fusion.spec.after_layers:
                residual = residual.index_add(0, images.rows, self.fusion(update, residual, images).to(residual.dtype))
            if self._recompute and torch.is_grad_enabled():
                update, residual = checkpoint(layer, update, residual, rotation, attend, use_reentrant=False)
            else:
                update, residual = layer(update, residual, rotation, attend)
        return update, residual

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, dim] final states -> [R, vocab]. A tied head multiplies with the embedding as it is, so that no second copy is kept."""
        if self.head is None and self.embed.packed is not None:
            return self.embed.packed.apply(hidden)
        logits: Tensor = self.kernels.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return logits

    def gradient_checkpointing_enable(self, on: bool = True) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again (Chen et al. 2016): a layer more of arithmetic for
        most of the activations' memory."""
        self._recompute = on

    def use(self, kernels: Kernels) -> None:
        """Compute with these kernels from now on."""
        for module in self.modules():
            if isinstance(module, Computed):
                module.kernels = kernels
        self._whole = bind_layers([layer.parts for layer in self._layers()], self.spec.norm_eps)

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its activations."""
        return self.norm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take, packed ones included."""
        holders = (module for module in self.modules() if isinstance(module, Linear | Embedding))
        packed = sum(module.packed.bytes for module in holders if module.packed is not None)
        return packed + sum(parameter.nbytes for parameter in self.parameters())
