#!/bin/sh
# Builds an image with buildah, without a daemon and without a hub: docker/image.sh cpu|gpu|jetson.
# BASE names the base image; without one a Debian 12 is made by debootstrap and kept as an image. WHEELS is a directory of wheels to take first
# and TORCH_INDEX an additional index for torch; without them the settings of this machine's pip count. TAG names the result.
# Needs root, or buildah's own rootless set-up; the two Debian packages are installed when they are missing and apt-get is there.
set -eu

cd "$(dirname "$0")/.."
kind=${1:?image: say which image: cpu, gpu or jetson}
tag=${TAG:-localhost/deepseek-service:$kind}
debian_base=localhost/deepseek-base:bookworm
test -f "docker/$kind.Dockerfile" || { echo "image: there is no image $kind; say cpu, gpu or jetson" >&2; exit 2; }
test "$kind" != jetson || test -n "${BASE:-}" || { echo "image: name NVIDIA's L4T image of your JetPack with BASE=" >&2; exit 2; }

test -z "${WHEELS:-}" || test -d "$WHEELS" || { echo "image: WHEELS=$WHEELS is not a directory; name the one that holds torch's wheel" >&2; exit 2; }

need() {
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "image: installing $1"
        apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "$1" >/dev/null
    else
        echo "image: $1 is needed; install the package $1" >&2
        exit 2
    fi
}

# debootstrap's own choice of mirror, the security updates of the same mirror, and nothing that a second package manager run brings back.
make_base() {
    need debootstrap
    echo "image: making the base with debootstrap (a minute, once)"
    root=$(mktemp --directory)
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root/base" ${MIRROR:+"$MIRROR"} >"$root/log" 2>&1 || {
        tail -n 20 "$root/log" >&2
        exit 1
    }
    awk '{ print; mirror = $2; sub("/$", "", mirror); print "deb " mirror "-security bookworm-security main" }' \
        "$root/base/etc/apt/sources.list" >"$root/sources" && mv "$root/sources" "$root/base/etc/apt/sources.list"
    rm -rf "$root"/base/var/cache/apt/* "$root"/base/var/lib/apt/lists/* "$root"/base/var/log/* \
        "$root"/base/usr/share/doc/* "$root"/base/usr/share/man/* "$root"/base/usr/share/locale/*
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$root/base" / >/dev/null
    buildah config --cmd /bin/sh "$container"
    buildah commit --quiet --rm "$container" $debian_base >/dev/null
    rm -rf "$root"
}

need buildah
if [ -z "${BASE:-}" ]; then
    BASE=$debian_base
    buildah inspect --type image $debian_base >/dev/null 2>&1 || make_base
fi

settings=$(mktemp --directory)
trap 'rm -rf "$settings"' EXIT
"${PYTHON:-python3}" docker/pip_settings.py "$settings"
# What lies beside pip is this machine's choice of torch, which is the cpu image's too; another image is told.
test "$kind" != cpu || WHEELS=${WHEELS:-$(cat "$settings/wheels")}
buildah build --isolation chroot --format docker --layers \
    --secret "id=pip,src=$settings/pip.conf" --secret "id=ca,src=$settings/ca.pem" \
    --build-arg "BASE=$BASE" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" \
    ${WHEELS:+--build-context "wheels=$WHEELS"} \
    --file "docker/$kind.Dockerfile" --tag "$tag" .
echo "image: built $tag"
