#!/usr/bin/env bash
# guest_rdma.sh - fetches what programs of the guest of tools/guest.sh need to use RDMA.
#
#   tools/guest_rdma.sh FOLDER
#
# FOLDER then holds the distribution's pyverbs, libibverbs and its drivers, and perftest (for tools/bench_rdma.py),
# unpacked: the guest has it over the host's root. Nothing is installed, because these packages would bring others
# with them that change the host (udev). It is there as a whole or not at all, and needs no privilege.
set -euo pipefail

PACKAGES=(python3-pyverbs ibverbs-providers libibverbs1 librdmacm1 libnl-3-200 libnl-route-3-200
    perftest libibumad3 libpci3)

fail() {
    echo "guest: $1; $2" >&2
    exit 125
}

# With the host's own lists, else with lists of our own: there may be none yet.
download() {
    local own=(-o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
    (cd "$work/debs" && apt-get -qq download "${PACKAGES[@]}") 2>/dev/null && return
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    apt-get -qq "${own[@]}" update && (cd "$work/debs" && apt-get -qq "${own[@]}" download "${PACKAGES[@]}")
}

main() {
    folder=$1
    mkdir -p "$(dirname "$folder")"
    exec {lock}>"$(dirname "$folder")/.lock"
    flock "$lock"
    # One that was made before it held perftest is made anew.
    [ ! -e "$folder/usr/bin/ib_read_lat" ] || return 0
    command -v apt-get >/dev/null || fail "apt-get is missing" "use a host with Debian's packages"
    work=$(mktemp -d "$folder.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/debs" "$work/tree"
    echo "guest: fetching ${PACKAGES[*]}" >&2
    download 2>"$work/log" || { cat "$work/log" >&2; fail "the packages could not be fetched" "try again"; }
    for package in "$work"/debs/*.deb; do
        dpkg-deb -x "$package" "$work/tree"
    done
    # Over a root whose /lib is a link there must be no folder of that name.
    if [ -d "$work/tree/lib" ]; then
        cp -a "$work/tree/lib/." "$work/tree/usr/lib/"
        rm -rf "$work/tree/lib"
    fi
    rm -rf "$work/tree/usr/share"
    chmod 755 "$work/tree"
    rm -rf "$folder"
    mv "$work/tree" "$folder"
}

main "$@"
