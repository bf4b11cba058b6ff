#!/usr/bin/env bash
# guest_kernel.sh - fetches a Debian kernel for tools/guest.sh, and what its guest starts with.
#
#   tools/guest_kernel.sh SUITE FOLDER
#
# FOLDER then holds: vmlinuz; busybox; modules/, link/ and rdma/, kernel modules in the order in
# which they must be loaded; version.  It is there as a whole or not at all.  Needs no
# privilege: apt is given lists and a cache of its own, and nothing is installed.
set -euo pipefail

# For a root file system that is the host's, over 9p, and for two streams of output.
MODULES=(virtio_pci virtio_console 9pnet_virtio 9p overlay)
# For a network card, which is one end of a wire between two guests.
LINK_MODULES=(virtio_net)
# For a Soft-RoCE device; its driver asks for a checksum by name, which newer kernels have built in.
RDMA_MODULES=(crc32_generic? dummy rdma_rxe)
# Only these parts of the package are unpacked: the whole of it takes 400 MB.
FOLDERS=(arch/x86/crypto crypto drivers/char/virtio_console.ko* drivers/infiniband/core
    drivers/infiniband/sw drivers/net/dummy.ko* drivers/net/net_failover.ko* drivers/net/virtio_net.ko* drivers/virtio fs/9p fs/fscache fs/netfs fs/overlayfs
    lib net/9p net/core net/ipv4 net/ipv6)
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "guest: $1; $2" >&2
    exit 125
}

need() {
    command -v "$1" >/dev/null || fail "$1 is missing" "install it: apt-get install $2"
}

# Where apt gets the host's own release from, or what the caller names.
mirrors() {
    local codename
    if [ -n "${FARMEM_GUEST_MIRROR:-}" ]; then
        echo "$FARMEM_GUEST_MIRROR"
        return
    fi
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    apt-get update --print-uris 2>/dev/null | sed -n "s|^'\(.*\)/dists/$codename/InRelease'.*|\1|p"
}

with_apt() {
    local program=$1
    shift
    "$program" -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root \
        -o APT::Architecture=amd64 -o APT::Default-Release="$suite" -o Acquire::Retries=3 "$@"
}

# The first mirror that has the suite, signed by Debian.
choose_mirror() {
    local uri part
    while read -r uri; do
        # Backports alone would lack what the release itself has.
        for part in "$suite" "${suite%-backports}"; do
            echo "deb [signed-by=$KEYRING] $uri $part main"
        done | sort -u >"$work/sources.list"
        if with_apt apt-get update 2>"$work/apt.log" && [ -n "$(with_apt apt-cache search --names-only '^linux-image-amd64$')" ]; then
            return
        fi
    done < <(mirrors)
    cat "$work/apt.log" >&2 2>/dev/null || true
    fail "no package mirror has a kernel of Debian $suite" \
        "check the suite's name, and name a mirror of Debian's: FARMEM_GUEST_MIRROR=URL tools/guest.sh --setup"
}

# The packages that a kernel consists of: one, or since Linux 7 several.
kernel_packages() {
    local seen=linux-image-amd64 found=linux-image-amd64
    while [ -n "$found" ]; do
        # shellcheck disable=SC2086 # package names
        found=$(with_apt apt-cache depends $found | awk '$1 == "Depends:" && $2 ~ /^linux-(image|binary|modules|base)-[0-9]/ { print $2 }')
        seen+=" $found"
    done
    tr ' ' '\n' <<<"$seen" | grep '[0-9]\.[0-9]' | sort -u
}

unpack() {
    local package patterns=('*/vmlinuz*' '*/modules.builtin' '*/modules.order')
    patterns+=("${FOLDERS[@]/#/*/kernel/}")
    mkdir "$work/tree"
    for package in "$work"/debs/linux-*.deb; do
        # tar complains of patterns without a match: which folders there are differs between versions.
        dpkg-deb --fsys-tarfile "$package" | tar -C "$work/tree" -x --wildcards "${patterns[@]}" 2>/dev/null || true
    done
    [ ! -d "$work/tree/usr/lib" ] || mv "$work/tree/usr/lib" "$work/tree/lib"
    find "$work/tree" -name '*.ko.xz' -exec xz -d {} +
    dpkg-deb --fsys-tarfile "$work"/debs/busybox-static_*.deb | tar -x -O --wildcards '*bin/busybox' >"$work/out/busybox"
    chmod 755 "$work/out/busybox"
}

# Puts a module into order[], after those that it needs.  A question mark behind a name: if there is one.
order_module() {
    local name=${1%\?} path needed
    path=$(awk -F: -v name="/$name.ko" 'substr($1, length($1) - length(name) + 1) == name { print $1 }' "$dep")
    if [ -z "$path" ]; then
        [[ $1 == *\? ]] || grep -q "/$name.ko" "$lib/modules.builtin" || fail "Linux $version has no module $name" "take another suite"
        return 0
    fi
    [[ " ${order[*]} " != *" $path "* ]] || return 0
    for needed in $(awk -F: -v path="$path" '$1 == path { print $2 }' "$dep"); do
        order_module "$(basename "$needed" .ko)"
    done
    order+=("$path")
}

# Copies modules and what they need to a folder, numbered; what an earlier folder has is left out.
place_modules() {
    local folder=$1 name path number=100
    shift
    local before=${#order[@]}
    mkdir "$work/out/$folder"
    for name in "$@"; do
        order_module "$name"
    done
    for path in "${order[@]:$before}"; do
        number=$((number + 1))
        cp "$lib/$path" "$work/out/$folder/$number-$(basename "$path")"
    done
}

main() {
    suite=$1 folder=$2 order=()
    need apt-get apt
    need dpkg-deb dpkg
    need xz xz-utils
    [ -e "$KEYRING" ] || fail "Debian's keys are missing" "install them: apt-get install debian-archive-keyring"
    mkdir -p "$(dirname "$folder")"
    exec {lock}>"$(dirname "$folder")/.lock"
    flock "$lock"
    # One that was made before there were wires is made anew.
    if [ -e "$folder/version" ] && [ -d "$folder/link" ]; then return 0; fi
    work=$(mktemp -d "$folder.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,out}
    choose_mirror
    mapfile -t packages < <(kernel_packages)
    echo "guest: fetching ${packages[*]}" >&2
    (cd "$work/debs" && with_apt apt-get download busybox-static "${packages[@]}" 2>"$work/apt.log") ||
        { cat "$work/apt.log" >&2; fail "the kernel of Debian $suite could not be fetched" "try again"; }
    unpack
    version=$(basename "$work"/tree/lib/modules/*)
    lib=$work/tree/lib/modules/$version dep=$work/tree/lib/modules/$version/modules.dep
    find "$work/tree" -name 'vmlinuz*' -type f -exec cp {} "$work/out/vmlinuz" \;
    [ -s "$work/out/vmlinuz" ] || fail "the packages of Linux $version hold no kernel image" "take another suite"
    "$work/out/busybox" depmod -b "$work/tree" "$version"
    place_modules modules "${MODULES[@]}"
    place_modules link "${LINK_MODULES[@]}"
    place_modules rdma "${RDMA_MODULES[@]}"
    echo "$version" >"$work/out/version"
    rm -rf "$folder"
    mv "$work/out" "$folder"
}

main "$@"
