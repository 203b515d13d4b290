#!/bin/sh
# Steps of the images' builder stage, one word each: packages, dependencies, project, strip. The Dockerfiles share them.
# It does not know which image it builds: TORCH says `cpu` or `cuda`, TORCH_INDEX may name an additional package index for torch, and wheels
# that lie in /wheels are taken before any index. Invariant: versions are those of constraints.txt, and pip itself is not in the result.
set -eu

ROOT=/opt/deepseek

# pip of the builder installs into the result, which has none.
into_root() {
    python3 -m pip --python $ROOT/bin/python --no-cache-dir --disable-pip-version-check \
        install --root-user-action ignore --constraint constraints.txt --find-links /wheels ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$@"
}

packages() {
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "$@" >/dev/null
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /usr/share/doc/* /usr/share/man/* /usr/share/locale/*
}

# Every requirement of the package with its extra `torch`, read from pyproject.toml: this layer changes only when they do.
dependencies() {
    python3 -m venv --without-pip $ROOT
    python3 - >/requirements.txt <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["torch"]))
PYTHON
    test "$TORCH" != cpu || refuse_cuda
    into_root --quiet --requirement /requirements.txt
}

# A CUDA build would add gigabytes that a cpu image never uses; said before they are installed.
refuse_cuda() {
    report=$(mktemp)
    into_root --quiet --dry-run --no-deps --ignore-installed --report "$report" torch
    python3 - "$report" <<'PYTHON'
import json
import sys
torch = json.load(open(sys.argv[1]))["install"][0]["metadata"]
if any(need.lower().startswith(("nvidia-", "cuda-", "triton")) for need in torch.get("requires_dist", [])):
    raise SystemExit(
        f"install: torch {torch['version']} of the default index is a CUDA build. Give the cpu image torch's CPU build: "
        "make image WHEELS=DIRECTORY with its wheel, or TORCH_INDEX=URL of the index that its project names."
    )
PYTHON
}

project() {
    into_root --quiet --no-deps .
}

# What serving never opens. torch_shm_manager stays: `import torch` asks for its path.
strip() {
    cd $ROOT/lib/python3*/site-packages
    rm -rf torch/test torch/include torch/share numpy/*/tests numpy/tests sympy/*/tests sympy/*/*/tests networkx/*/tests networkx/*/*/tests
    find torch/bin -mindepth 1 ! -name torch_shm_manager -delete
    find torch/lib \( -name '*.a' -o -name '*test*.so' -o -name 'libjitbackend*' -o -name 'libbackend_with_compiler*' \) -delete
    find . -path ./torch/testing -prune -o -type d -name __pycache__ -path '*/tests/*' -exec rm -rf {} +
    $ROOT/bin/python - "$TORCH" <<'PYTHON'
import sys
import torch
if (torch.version.cuda is None) != (sys.argv[1] == "cpu"):
    raise SystemExit(f"install: torch {torch.__version__} is not the {sys.argv[1]} build that this image is for; see WHEELS and TORCH_INDEX.")
print(f"install: torch {torch.__version__} in place")
PYTHON
}

step=$1
shift
"$step" "$@"
