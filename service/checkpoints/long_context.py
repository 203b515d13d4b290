"""What the user asks of a model's attention beyond what its checkpoint says: windows, far blocks, layers kept dense, a longer context.

From a spec to a spec; no weights change, so it holds for any model that was trained with full attention. It does not know files or
flags' spelling in the environment. Invariant: what cannot hold is refused with the flag, the reason and what to do; nothing is ignored.
"""

from __future__ import annotations

from dataclasses import replace

from service.types.errors import SettingsError
from service.types.kv_layout import BLOCK_TOKENS, FarSpec, FarStore
from service.types.model_spec import GroupedQueryAttention, LayerSpec, ModelSpec, RopeScaling, RopeSpec
from service.types.settings import AttentionSettings

# `bf16` names the store that keeps the model's own type.
STORES = {"int8": FarStore.INT8, "int4": FarStore.INT4, "bf16": FarStore.NATIVE, "evict": FarStore.EVICT}
_SCALINGS = {"linear": RopeScaling.LINEAR, "dynamic": RopeScaling.DYNAMIC, "yarn": RopeScaling.YARN}


def adapt(spec: ModelSpec, asked: AttentionSettings) -> ModelSpec:
    """The spec as it is to be served. Raises SettingsError when the model cannot hold what was asked."""
    spec = _with_context(spec, asked)
    _refuse_contradictions(asked)
    own = next((layer.attention for layer in spec.layers if layer.attention.far), None)
    dense = _dense_layers(spec, asked, own is not None)
    _refuse_unheld(spec, asked, dense, own is not None)
    layers = [_dense(layer) if index in dense else _served(layer, asked, own) for index, layer in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layers))


def dense_by_choice(spec: ModelSpec) -> tuple[int, ...]:
    """The layers of a model that read everything while others of it have far blocks."""
    if not any(layer.attention.far for layer in spec.layers):
        return ()
    return tuple(index for index, layer in enumerate(spec.layers) if layer.attention.far is None and layer.attention.window is None)


def _dense_layers(spec: ModelSpec, asked: AttentionSettings, has_far: bool) -> tuple[int, ...]:
    """The layers that are to read everything: those named, else the model's own where it has far blocks. Raises SettingsError."""
    if asked.dense_layers is None:
        return dense_by_choice(spec)
    for index in asked.dense_layers:
        if not 0 <= index < len(spec.layers):
            raise SettingsError(f"--dense_layers names layer {index}, and the model has the layers 0 … {len(spec.layers) - 1}.")
        attention = spec.layers[index].attention
        if (has_far or asked.attention_window) and attention.window is not None and attention.far is None:
            raise SettingsError(f"--dense_layers names layer {index}, which was trained with a window: leave it out.")
    return asked.dense_layers


def _refuse_unheld(spec: ModelSpec, asked: AttentionSettings, dense: tuple[int, ...], has_far: bool) -> None:
    """Raises SettingsError where no layer is left that could take what was asked."""
    changes = asked.far_blocks or asked.far_refresh or asked.kv_far != "auto" or asked.dense_layers is not None or asked.prefill != "sparse"
    if changes and not (has_far or asked.attention_window):
        raise SettingsError("--far_blocks, --far_refresh, --kv_far, --prefill and --dense_layers need --attention_window for this model.")
    able = {index for index, layer in enumerate(spec.layers) if layer.attention.window is None or layer.attention.far}
    if (asked.attention_window or changes) and not able:
        raise SettingsError("--attention_window is for layers that read everything, and every layer of this model has a window.")
    if asked.dense_layers is not None and able <= set(dense):
        instead = "serve without --attention_window" if asked.attention_window else f"set --attention_window {spec.context_tokens} instead"
        raise SettingsError(f"--dense_layers leaves no layer with a window: leave one out, or {instead}.")


def _refuse_contradictions(asked: AttentionSettings) -> None:
    if 0 < asked.attention_window < BLOCK_TOKENS:
        raise SettingsError(f"--attention_window {asked.attention_window} is shorter than a block: give at least {BLOCK_TOKENS} tokens.")
    if asked.far_refresh and BLOCK_TOKENS % asked.far_refresh:
        raise SettingsError(f"--far_refresh {asked.far_refresh} must divide the block size of {BLOCK_TOKENS} tokens: 1, 2, 4 … 64.")
    if asked.kv_far == "evict" and (asked.far_blocks or asked.prefill == "dense"):
        raise SettingsError("--kv_far evict keeps no far blocks, so --far_blocks and --prefill dense cannot hold: leave them out.")


def _served(layer: LayerSpec, asked: AttentionSettings, own: GroupedQueryAttention | None) -> LayerSpec:
    """The layer with a window and far blocks, as asked, else as the model's `own` layers have them; or as it is where neither says any."""
    attention = layer.attention
    if attention.far is None and (attention.window is not None or not (asked.attention_window or own)):
        return layer
    like = attention if attention.far is not None or own is None else own
    far = like.far or FarSpec()
    far = replace(
        far,
        blocks=asked.far_blocks or far.blocks,
        refresh=asked.far_refresh or far.refresh,
        store=STORES.get(asked.kv_far, far.store),
        dense_prompts=far.dense_prompts or asked.prefill == "dense",
    )
    changed: GroupedQueryAttention = replace(attention, window=asked.attention_window or like.window, far=far)
    return replace(layer, attention=changed)


def _dense(layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=replace(layer.attention, window=None, far=None)) if layer.attention.far else layer


def _with_context(spec: ModelSpec, asked: AttentionSettings) -> ModelSpec:
    context, scaling = asked.max_position_embeddings, asked.rope_scaling
    if not context or context <= spec.context_tokens:
        if scaling != "auto":
            raise SettingsError(
                f"--rope_scaling is for more positions than the model's {spec.context_tokens}: set --max_position_embeddings above that."
            )
        return replace(spec, context_tokens=context) if context else spec
    if scaling == "auto":
        raise SettingsError(
            f"--max_position_embeddings {context} is more than the model's {spec.context_tokens}: say with --rope_scaling how it gets "
            "there: dynamic, yarn or linear (scaled), or keep (positions that it was never trained on)."
        )
    if scaling == "keep":
        return replace(spec, context_tokens=context)
    if spec.rope.scaling is not RopeScaling.DEFAULT:
        raise SettingsError(
            f"--rope_scaling {scaling} cannot hold: the model's rotation is scaled already ({spec.rope.scaling.value}); give keep, "
            "or fewer positions."
        )
    trained = spec.rope.original_context or spec.context_tokens
    rope = RopeSpec(spec.rope.theta, spec.rope.rotary_dim, _SCALINGS[scaling], context / trained, trained)
    return replace(spec, context_tokens=context, rope=rope)
