#!/bin/sh
# The compiled kernels on aarch64 without such a machine: cross-compiled here, their tests run by an arm64 Python under qemu.
# Needs Debian's gcc-aarch64-linux-gnu and qemu-user-static, apt-get and dpkg; everything else comes into .tools/arm64. Takes some twenty minutes.
# Tests that start programs of their own are left out: an emulated program cannot start another.
set -eu
cd "$(dirname "$0")/../.."
for needed in aarch64-linux-gnu-gcc qemu-aarch64-static apt-get dpkg unzip; do
    command -v $needed >/dev/null 2>&1 || { echo "arm64: $needed is missing; apt-get install gcc-aarch64-linux-gnu qemu-user-static unzip" >&2; exit 3; }
done
here=$PWD/.tools/arm64 python=${PYTHON:-.venv/bin/python}
mkdir -p "$here/lists/partial" "$here/archives/partial" "$here/root" "$here/wheels" "$here/site"

if ! test -f "$here/root/complete"; then
    # Lists and caches of its own, so that the machine's stay as they are.
    apt() {
        command=$1
        shift
        "$command" -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State::Lists="$here/lists" \
            -o Dir::Cache="$here" -o Dir::Cache::Archives="$here/archives" "$@"
    }
    apt apt-get update
    names=$(apt apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
        python3.11 libstdc++6 libgomp1 | sed -n 's/^\([a-z][^:]*\).*/\1/p' | sort -u)
    test -n "$names" || { echo "arm64: this Debian has no python3.11 (bookworm has)" >&2; exit 3; }
    (cd "$here/archives" && apt apt-get download $names)
    for package in "$here"/archives/*.deb; do dpkg -x "$package" "$here/root"; done
    touch "$here/root/complete"
fi
if ! test -f "$here/site/complete"; then
    $python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --dest "$here/wheels" torch==2.9.1 numpy==2.4.6 pytest==9.2.0 hypothesis==6.170.17 typing_extensions sympy networkx jinja2 fsspec \
        filelock mpmath iniconfig packaging pluggy sortedcontainers attrs markupsafe pygments pytest-asyncio
    for wheel in "$here"/wheels/*.whl; do unzip -q -o "$wheel" -d "$here/site"; done
    touch "$here/site/complete"
fi

rm -rf "$here/project" && mkdir "$here/project"
cp -r service tests pyproject.toml setup.py "$here/project"
cd "$here/project"
rm -f service/kernels/native/*.so
aarch64-linux-gnu-gcc -O3 -std=gnu11 -fPIC -shared -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Werror \
    -DNATIVE_SOURCES='"cross"' service/kernels/native/*.c -o service/kernels/native/_native.cpython-311-aarch64-linux-gnu.so
exec env -i PATH=/usr/bin HOME=/tmp OMP_NUM_THREADS=1 PYTHONPATH="$here/site:$here/project" QEMU_LD_PREFIX="$here/root" \
    qemu-aarch64-static "$here/root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider tests/kernels/test_native_attention.py \
    tests/kernels/test_native_elementwise.py tests/kernels/test_native_linear.py tests/kernels/test_native_window_sparse.py \
    tests/kernels/test_native_demote.py tests/kernels/test_int8_cache.py tests/kernels/test_cross_attention.py \
    tests/kernels/test_kv_store.py tests/kernels/test_int8_sparse.py tests/kernels/test_quantised.py tests/kernels/test_native_decoder.py \
    --deselect tests/kernels/test_quantised.py::test_torch_computes_exactly_where_its_own_product_of_bytes_does_not "$@"
