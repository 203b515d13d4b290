#!/bin/sh
# Unpack Debian packages into .tools without installing them: no root, no service is started, nothing outside this directory changes.
# Usage: deploy/fetch.sh PACKAGE...   The programs are then in .tools/usr/bin. Libraries that a package needs must be there already.
set -eu
cd "$(dirname "$0")/.."
command -v apt-get >/dev/null 2>&1 && command -v dpkg >/dev/null 2>&1 || {
    echo "fetch: this needs Debian's apt-get and dpkg; install $* by hand instead" >&2
    exit 3
}
mkdir -p .tools/archives
for package in "$@"; do
    (cd .tools/archives && apt-get download "$package" >/dev/null) || { echo "fetch: $package cannot be downloaded" >&2; exit 3; }
    dpkg -x .tools/archives/"$package"_*.deb .tools
    rm .tools/archives/"$package"_*.deb
done
