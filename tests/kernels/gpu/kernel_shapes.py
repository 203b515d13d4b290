"""The kernels and shapes that the compile gate builds: argument types, constants, warps and stages as the host functions choose them.

Each shape names what it must fulfil: the stack it may use (spilled registers), and whether it must multiply by warp group on sm_90.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from service.kernels.gpu.choice_scores import LARGEST_STEP
from service.kernels.gpu.choose_far import FEWEST_ANCHORS, TILE_ROWS, tile_candidates
from service.kernels.gpu.cross_attention import image_tile
from service.kernels.gpu.int8_linear import product_tile
from service.kernels.gpu.ordered_linear import ordered_tile
from service.kernels.gpu.paged_attention import decode_tile, tile_of
from service.kernels.gpu.tile_visits import GATHERED, MARKED
from service.kernels.gpu.window_sparse import sparse_row, sparse_tile
from service.kernels.reference_sparse import FIRST_STAGE, SECOND_STAGE

# Stack that a float32 kernel may use: its products are not those of tensor cores, and it is the path to compare with, not to serve on.
FLOAT32_STACK = 1024
# And demotion to 8 bits at head_dim 256, which comes once a block.
WIDE_STACK = 128
TORCH_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Types of a far store's blocks and of its scales.
STORES = {"int8": ("*i8", "fp16"), "int4": ("*u8", "fp16"), "native": ("*bf16", "bf16")}
ALL = (80, 87, 90)


@dataclass(frozen=True)
class Shape:
    """One kernel of service.kernels.gpu.<module> at one shape."""

    name: str
    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    stack_bytes: int = 0
    wgmma: bool = False
    capabilities: tuple[int, ...] = field(default=ALL)
    fusion: bool = True

    def function(self) -> Any:
        """The kernel."""
        return getattr(importlib.import_module(f"service.kernels.gpu.{self.module}"), self.kernel)

    def aligned(self, signature: Mapping[str, str]) -> list[str]:
        """Arguments that are divisible by 16 at run time: pointers, strides, sizes of layers."""
        sizes = ("inputs", "outputs", "hidden")
        return [
            name
            for name, kind in signature.items()
            if kind.startswith("*") or (kind != "constexpr" and (name.startswith("stride_") or name in sizes))
        ]


def attention_types(kind: str) -> dict[str, str]:
    """Types of the arguments of the dense attention kernels for queries of `kind`."""
    data = {name: f"*{kind}" for name in ("p_query", "p_keys", "p_values", "p_out")}
    integers = ("p_tables", "p_query_starts", "p_context_lengths", "p_tile_ends", "p_split_ends")
    floats = ("p_peaks", "p_sums", "p_parts")
    types = data | dict.fromkeys(integers, "*i32") | dict.fromkeys(floats, "*fp32") | {"p_sinks": f"*{kind}"}
    types |= {"sequences": "i32", "scale": "fp32", "cap": "fp32"}
    parts = ("query_token", "query_head", "out_token", "out_head", "table")
    parts += tuple(f"{store}_{part}" for store in ("key", "value") for part in ("block", "head"))
    return types | {f"stride_{part}": "i32" for part in parts}


def attention_constants(dim: int, group: int, window: int, **changes: Any) -> dict[str, Any]:
    """Constants of the dense attention kernels."""
    block = 1 << (dim - 1).bit_length()
    constants = {
        "SEQUENCES": 256, "GROUP": group, "KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_KEY": block, "BLOCK_VALUE": block,
        "BLOCK_TOKENS": 64, "SPLIT_BLOCKS": 8, "WINDOW": window, "CAPPED": False, "SINKS": False, "PRECISION": "tf32",
    }  # fmt: skip
    return constants | token_strides(dim) | changes


def token_strides(dim: int, store: str = "") -> dict[str, int]:
    """Strides between the tokens of a block, near and far."""
    far = dim // 2 if store == "int4" else dim
    return {"stride_key_token": dim, "stride_value_token": dim, "stride_far_key_token": far, "stride_far_value_token": far}


def dense_shapes() -> list[Shape]:
    """Prefill and decode over head sizes, types, windows, caps and sinks."""
    shapes = []
    cases = [("bf16", dim, 4, 0, {}) for dim in (64, 80, 96, 128, 256)]
    cases += [
        ("bf16", 64, 4, 2048, {}),
        ("bf16", 128, 4, 2048, {}),
        ("fp16", 128, 7, 0, {}),
        ("fp32", 64, 4, 0, {}),
        ("fp32", 128, 1, 0, {}),
    ]
    cases += [("bf16", 128, 8, window, {"CAPPED": True, "SINKS": True}) for window in (0, 2048)]
    for (kind, dim, group, window, extra), chip in product(cases, ALL):
        name = f"{kind}-d{dim}-g{group}-w{window}" + "".join(f"-{key.lower()}" for key in extra)
        constants = attention_constants(dim, group, window, **extra, **({"PRECISION": "ieee"} if kind == "fp32" else {}))
        types, stack = attention_types(kind), FLOAT32_STACK if kind == "fp32" else 0
        for kernel, module, tile in (
            ("prefill", "dense_tiles", tile_of(TORCH_TYPES[kind], dim, chip)),
            ("decode", "dense_rows", decode_tile(TORCH_TYPES[kind], dim, group)),
        ):
            options = (types, constants | {"ROWS": tile.rows}, *tile[1:], stack, tile.rows >= 64, (chip,))
            shapes.append(Shape(f"{kernel}-{name}", module, f"{kernel}_kernel", *options))
    reduced = Shape("reduce-d128", "dense_rows", "reduce_kernel", attention_types("bf16"), attention_constants(128, 4, 0), 1, 3)
    return [*shapes, *eight_bit_shapes(), reduced]


def eight_bit_shapes() -> list[Shape]:
    """Dense attention over keys and values of 8 bits; windows and groups that divide no tile take most registers."""
    shapes = []
    types = attention_types("bf16") | dict.fromkeys(("p_keys", "p_values"), "*fp8e4nv")
    for dim, group, window in ((64, 4, 0), (128, 4, 0), (128, 7, 2048)):
        wide, row = tile_of(torch.bfloat16, dim, 90), decode_tile(torch.bfloat16, dim, group)
        constants, name = attention_constants(dim, group, window), f"fp8-d{dim}" + (f"-g{group}-w{window}" if window else "")
        widest, lone = constants | {"ROWS": wide.rows}, constants | {"ROWS": row.rows}
        shapes.append(Shape(f"prefill-{name}", "dense_tiles", "prefill_kernel", types, widest, *wide[1:], 0, True, (90,)))
        shapes.append(Shape(f"decode-{name}", "dense_rows", "decode_kernel", types, lone, *row[1:], 0, False, (90,)))
    return shapes


def elementwise_shapes() -> list[Shape]:
    """Shapes of each elementwise kernel and of the K/V writes."""
    data = (
        "p_x",
        "p_residual",
        "p_weight",
        "p_out",
        "p_total",
        "p_gate_up",
        "p_logits",
        "p_key",
        "p_value",
        "p_key_blocks",
        "p_value_blocks",
        "p_heads",
    )
    types = dict.fromkeys(data, "*bf16") | dict.fromkeys(("p_cos", "p_sin"), "*fp32") | dict.fromkeys(("p_block_ids", "p_offsets"), "*i64")
    types |= dict.fromkeys(("rows", "heads", "hidden", "query_heads"), "i32") | {"eps": "fp32"}
    strides = ("outer", "inner", "token", "head", "row", "key_token", "key_head", "value_token", "value_head")
    strides += tuple(f"{store}_block{part}" for store in ("key", "value") for part in ("", "_head", "_token"))
    types |= {f"stride_{name}": "i32" for name in strides}
    pairs = {"DIM": 128, "HALF": 64, "BLOCK_HALF": 64, "BLOCK_REST": 1, "ROWS": 16}
    narrow = dict.fromkeys(("p_key_blocks", "p_value_blocks"), "*fp8e4nv")
    turning = {"DIM": 128, "HALF": 64, "VALUE_DIM": 128, "BLOCK_HALF": 64, "BLOCK_REST": 1, "BLOCK_VALUE": 128}
    return [
        Shape("norm-4096", "elementwise", "norm_kernel", types, {"DIM": 4096, "BLOCK": 4096, "ROWS": 1, "ADD": True}, 8),
        Shape("norm-heads", "elementwise", "norm_kernel", types, {"DIM": 80, "BLOCK": 128, "ROWS": 8, "ADD": False}, 2),
        Shape("rotate", "elementwise", "rotate_kernel", types, pairs, 2),
        Shape("rotate-part", "elementwise", "rotate_kernel", types, pairs | {"DIM": 160, "BLOCK_REST": 32}, 2),
        Shape("swiglu", "elementwise", "swiglu_kernel", types, {"BLOCK": 1024}),
        Shape("head-gate", "elementwise", "gate_kernel", types, {"DIM": 64, "BLOCK": 64, "ROWS": 16}, 2),
        Shape("write-kv", "kv_store", "write_kernel", types, {"KEY_DIM": 128, "VALUE_DIM": 128, "BLOCK": 128}, 1),
        Shape("rotate-write", "kv_store", "rotate_write_kernel", types, turning, 1),
        Shape("rotate-write-fp8", "kv_store", "rotate_write_kernel", types | narrow, turning, 1, capabilities=(90,)),
        Shape("rotate-write-part", "kv_store", "rotate_write_kernel", types, turning | {"DIM": 160, "BLOCK_REST": 32}, 1),
    ]


def sparse_shapes() -> list[Shape]:
    """Attention over two stores, decode and prefill, over formats of the far store and head sizes; one of each over 8-bit near blocks."""
    cases = [("bf16", dim, 4, store, chip) for dim, store, chip in product((64, 128), STORES, ALL)]
    cases += [("fp16", 128, 4, "int8", chip) for chip in ALL]
    # A group that divides no tile, and one head a K/V head.
    cases += [("bf16", dim, group, "int8", chip) for dim, group, chip in product((64, 128), (1, 7), ALL)]
    # Rows of 80 and 96 values are padded to 128: half a row of nibbles is a mask of its own.
    others = ((80, "int4"), (96, "int8"), (256, "int8"), (256, "int4"), (256, "native"))
    cases += [("bf16", dim, 4, store, chip) for (dim, store), chip in product(others, ALL)]
    cases += [("fp32", dim, 4, store, chip) for dim, store, chip in product((64, 128), ("int8", "native"), ALL)]
    # Prompts that lie in their window read nothing far.
    cases += [("bf16", dim, group, "none", chip) for dim, group, chip in product((64, 128), (1, 4), ALL)]
    cases += [("bf16", 128, 7, "none", chip) for chip in ALL] + [("bf16", 256, 4, "none", chip) for chip in ALL]
    shapes = []
    for kind, dim, group, store, chip in cases:
        constants = attention_constants(dim, group, 2048, **({"PRECISION": "ieee"} if kind == "fp32" else {}))
        constants |= {
            "REFRESH": 1,
            "SINK_BLOCKS": 1,
            "HAS_FAR": store != "none",
            "BUDGET": 16,
            "QUANTISED": store in ("int8", "int4"),
            "NIBBLES": store == "int4",
        }
        constants |= token_strides(dim, store)
        kept = ("*fp32", "fp32") if (kind, store) == ("fp32", "native") else STORES.get(store, STORES["native"])
        types, stack = attention_types(kind) | sparse_types(*kept), FLOAT32_STACK if kind == "fp32" else 0
        (tile, tokens), row = sparse_tile(TORCH_TYPES[kind], dim, group, chip, store != "none"), sparse_row(TORCH_TYPES[kind], dim, group)
        wide, lone = constants | {"ROWS": tile.rows, "TOKENS": tokens}, constants | {"ROWS": row.rows}
        name = f"{kind}-d{dim}-g{group}-{store}"
        limits = (stack, tile.rows >= 64, (chip,))
        shapes.append(Shape(f"sparse-prefill-{name}", "sparse_tiles", "sparse_tile_kernel", types, wide, *tile[1:], *limits))
        shapes.append(Shape(f"sparse-decode-{name}", "sparse_rows", "sparse_row_kernel", types, lone, *row[1:], stack, False, (chip,)))
    row = sparse_row(torch.bfloat16, 128, 4)
    rule = {"ROWS": row.rows, "REFRESH": 1, "SINK_BLOCKS": 1, "HAS_FAR": True, "BUDGET": 16, "QUANTISED": True, "NIBBLES": False}
    types = attention_types("bf16") | sparse_types(*STORES["int8"]) | dict.fromkeys(("p_keys", "p_values"), "*fp8e4nv")
    constants = attention_constants(128, 4, 2048) | rule
    shapes.append(Shape("sparse-decode-fp8", "sparse_rows", "sparse_row_kernel", types, constants, *row[1:], capabilities=(90,)))
    return [*shapes, *visit_shapes()]


def visit_shapes() -> list[Shape]:
    """What tiles of prompts visit of the far store."""
    types = attention_types("bf16") | sparse_types(*STORES["int8"])
    constants = {"SEQUENCES": 256, "TOKENS": 32, "MARKED": MARKED, "GATHERED": GATHERED}
    return [Shape(f"visits-{part}", "tile_visits", f"{part}_kernel", types, constants, 1) for part in ("mark", "gather")]


def far_shapes() -> list[Shape]:
    """Demotion, scoring and selection over formats of the far store and head sizes; names say what is not 128 wide."""
    shapes = []
    for dim in (128, 64, 80, 256):
        block, wide = 1 << (dim - 1).bit_length(), "" if dim == 128 else f"-d{dim}"
        sizes = {"KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_KEY": block, "BLOCK_VALUE": block, "BLOCK_TOKENS": 64, "SUBS": 4}
        choose = {"GROUP": 4, "DIM": dim, "BLOCK_DIM": block, "SINK_BLOCKS": 1, "SUBS": 4, "KEPT": 128, "SCORED": 32}
        steps = {"HEADS": 4, "LARGEST": LARGEST_STEP}
        choose |= {"FIRST": FIRST_STAGE, "SECOND": SECOND_STAGE, "FEWEST": FEWEST_ANCHORS}
        types = attention_types("bf16") | sparse_types(*STORES["int8"])
        shapes.append(Shape(f"steps{wide}", "choice_scores", "steps_kernel", types, choose | steps, 1))
        shapes.append(Shape(f"score{wide}", "choice_scores", "score_kernel", types, choose | steps | {"CANDIDATES": 32}, 4))
        tile = {"PADDED": 4, "TOKENS": TILE_ROWS // 4}
        for chip in ALL:
            constants = choose | tile | {"CANDIDATES": tile_candidates(block, chip)}
            options = (types, constants, 4, 3, 0, True, (chip,))
            shapes.append(Shape(f"score-tile{wide}", "choice_scores", "score_tile_kernel", *options))
        for candidates, warps in ((256, 4), (2048, 4), (8192, 16), (16384, 8)) if dim == 128 else ((2048, 4),):
            constants = choose | {"CANDIDATES": candidates}
            shapes.append(Shape(f"select-{candidates}{wide}", "choose_far", "select_kernel", types, constants, warps))
        if dim == 128:
            shapes.append(Shape("mark-kept", "choice_scores", "mark_kept_kernel", types, choose | tile | {"MARKED": 128}, 1))
            shapes.append(Shape("pick", "choose_far", "pick_kernel", types, choose | {"MOST": 32}, 4))
            shapes.append(Shape("pick-8192", "choose_far", "pick_kernel", types, choose | {"KEPT": 8192, "MOST": 2048}, 8))
        for store, levels in (("int8", 127), ("int4", 7), ("native", 0)):
            types = attention_types("bf16") | sparse_types(*STORES[store])
            stack = WIDE_STACK if dim > 128 and store == "int8" else 0
            written = sizes | token_strides(dim, store) | {"LEVELS": levels}
            shapes.append(Shape(f"demote-{store}{wide}", "far_store", "demote_kernel", types, written, 8, 3, stack))
            how = token_strides(dim, store) | {
                "BLOCK_TOKENS": 64,
                "QUANTISED": levels > 0,
                "NIBBLES": store == "int4",
                "TOKENS": TILE_ROWS // 4,
            }
            shapes.append(Shape(f"product-{store}{wide}", "choice_scores", "product_kernel", types, choose | how, 4))
            if levels > 0:
                options = (types, choose | how | tile, 4)
                shapes.append(Shape(f"product-tile-{store}{wide}", "choice_scores", "product_tile_kernel", *options, wgmma=True))
    return shapes


def sparse_types(far: str, scales: str) -> dict[str, str]:
    """Types of what only the kernels of the two stores take."""
    types = dict.fromkeys(("p_far_keys", "p_far_values"), far) | dict.fromkeys(("p_key_scales", "p_value_scales"), f"*{scales}")
    types |= dict.fromkeys(("p_far_tables", "p_choices", "p_counts", "p_ends", "p_budgets", "p_kept"), "*i32")
    types |= dict.fromkeys(("p_marks", "p_indices", "p_readers", "p_visits"), "*i32")
    types |= {"p_steps": "*i16", "p_units": "*fp32", "anchors": "i32"}
    types |= dict.fromkeys(("p_anchors", "p_near_ids", "p_far_ids", "p_sequences"), "*i64")
    types |= {
        "p_bounds": "*i8",
        "p_part_bounds": "*i8",
        "p_bound_scales": "*fp16",
        "p_scores": "*fp32",
        "width": "i32",
        "most": "i32",
        "compared": "i32",
        "most_visits": "i32",
    }
    parts = tuple(f"far_{store}_{part}" for store in ("key", "value") for part in ("block", "head"))
    parts += ("scale_block", "scale_head", "far_table", "choice_anchor", "choice_head", "query_anchor")
    return types | {
        f"stride_{part}": "i32"
        for part in (*parts, "bound_block", "bound_head", "part_block", "part_head", "bound_scale_block", "bound_scale_head")
    }


def linear_shapes() -> list[Shape]:
    """Products with int8 weights for few and many rows, and the quantisation of activations."""
    types = {
        "p_x": "*i8",
        "p_weight": "*i8",
        "p_row_scales": "*fp32",
        "p_scales": "*fp32",
        "p_bias": "*bf16",
        "p_out": "*bf16",
        "p_steps": "*i8",
    }
    types |= dict.fromkeys(("rows", "outputs", "inputs", "stride_row"), "i32")
    shapes = [Shape("quantise-rows", "int8_linear", "quantise_kernel", types | {"p_x": "*bf16"}, {"BLOCK": 4096}, 8, fusion=False)]
    for rows, exact, chip in product((16, 128, 4096), (True, False), ALL):
        tile = product_tile(rows, exact, chip)
        constants = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "EXACT": exact, "BIAS": False, "PRECISION": "tf32"}
        name = f"{'w8a8' if exact else 'weight-only'}-{rows}"
        kinds = types if exact else types | {"p_x": "*bf16"}
        shapes.append(Shape(name, "int8_linear", "product_kernel", kinds, constants, tile.warps, tile.stages, 0, tile.rows >= 64, (chip,)))
    ordered = types | {"p_x": "*bf16", "p_weight": "*bf16", "stride_output": "i32"}
    for kind, dtype in TORCH_TYPES.items():
        pointers = {name: f"*{kind}" for name in ("p_x", "p_weight", "p_bias", "p_out")}
        tile = ordered_tile(dtype)
        constants = {"ROWS": tile.rows, "OUTPUTS": tile.outputs, "INPUTS": tile.inputs, "BIAS": True}
        constants["PRECISION"] = "ieee" if kind == "fp32" else "tf32"
        limits = (FLOAT32_STACK if kind == "fp32" else 0, tile.rows >= 64)
        options = (ordered | pointers, constants, tile.warps, tile.stages, *limits)
        shapes.append(Shape(f"ordered-{kind}", "ordered_linear", "ordered_kernel", *options))
    return shapes


def image_shapes() -> list[Shape]:
    """Attention to image tokens, with and without counts."""
    shapes = []
    strides = ("query_row", "query_head", "key_image", "key_head", "value_image", "value_head")
    types = {f"stride_{name}": "i32" for name in strides} | {"rows": "i32", "images": "i32", "scale": "fp32", "p_counts": "*i64"}
    for kind, size, counted in product(TORCH_TYPES, (64, 128), (True, False)):
        pairs, tokens, padded = image_tile(TORCH_TYPES[kind], size)
        constants = {"GROUP": 2, "ROWS": pairs, "IMAGES": tokens, "DIM": size, "BLOCK_DIM": padded, "COUNTED": counted}
        constants["PRECISION"] = "ieee" if kind == "fp32" else "tf32"
        pointers = {name: f"*{kind}" for name in ("p_query", "p_keys", "p_values", "p_out")}
        limits = (FLOAT32_STACK if kind == "fp32" else 0, pairs >= 64)
        name = f"images-{kind}-d{size}" + ("-counted" if counted else "")
        shapes.append(Shape(name, "cross_attention", "images_kernel", types | pointers, constants, 4, 2, *limits))
    return shapes


def sampling_shapes() -> list[Shape]:
    """The sampling kernel over logits of two types."""
    types = dict.fromkeys(("p_temperature", "p_min_p"), "*fp32") | dict.fromkeys(("p_top_k", "p_tokens"), "*i64")
    types |= dict.fromkeys(("p_top_p", "p_numbers"), "*fp64") | {"vocabulary": "i32", "stride_row": "i32"}
    constants = {"GREEDY_BELOW": 1e-5, "BLOCK": 1024}
    return [
        Shape(f"sample-{kind}", "sampling", "sample_kernel", types | {"p_logits": f"*{kind}"}, constants, 8) for kind in ("bf16", "fp32")
    ]


GROUPS = (dense_shapes, elementwise_shapes, sparse_shapes, far_shapes, linear_shapes, image_shapes, sampling_shapes)
SHAPES: list[Shape] = [shape for shapes in GROUPS for shape in shapes()]
