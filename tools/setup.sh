#!/usr/bin/env bash
# setup.sh - what farmem needs from the system, in one list.
#
#   tools/setup.sh build|test|guest   install what is missing (as root), or say what is
#   tools/setup.sh python             print the Python to use
#
# It never fails because something optional is missing: whoever needs it says so by
# name. It starts no service, and leaves none running.
set -euo pipefail

# Debian package names. Whoever adds a test that needs a program adds it here.
BUILD_PACKAGES=(gcc libc6-dev make cmake ninja-build libxxhash-dev libssl-dev nbdkit-plugin-dev libibverbs-dev)
TEST_PACKAGES=(sqlite3 redis-server redis-tools xz-utils liburing-dev libcap2-bin procps util-linux
    groff-base bash-completion zsh fish nbdkit qemu-utils)
# For tools/guest.sh, which boots another kernel; iproute2 has the program that makes Soft-RoCE devices.
GUEST_PACKAGES=(qemu-system-x86 xz-utils iproute2)
# For `farmem serve` (nbdkit) and for tests/pools, which uses it with other people's programs.
POOL_PACKAGES=(nbdkit libnbd-bin python3-libnbd qemu-utils curl openssl iproute2 systemd etcd-server)
PYTHON_VERSIONS=(python3 python3.14 python3.13 python3.12 python3.11)

fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} "${PYTHON_VERSIONS[@]}"; do
        if command -v "$name" >/dev/null && fits "$name"; then
            command -v "$name"
            return 0
        fi
    done
    echo "farmem: no Python 3.11 or newer in PATH: install one, or name it: make PYTHON=/path/to/python3" >&2
    return 1
}

# The packages that a distribution's Python lacks; another Python brings them itself.
python_packages() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || echo "python$version-dev"
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# A package's maintainer script asks this policy before it starts a service: no.
# A policy that is there already is the owner's, and stays.
with_services_held() {
    local policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    local status=0
    "$@" || status=$?
    rm -f "$policy"
    trap - EXIT
    return "$status"
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    echo "farmem: installing $*" >&2
    local apt=(apt-get -qq -y -o Dpkg::Use-Pty=0)
    if ! { "${apt[@]}" update && with_services_held "${apt[@]}" --no-install-recommends install "$@"; } >/dev/null; then
        echo "farmem: apt-get could not install $*; going on without" >&2
        return 0
    fi
    local package
    for package in redis-server etcd-server; do
        case " $* " in
            *" $package "*) hold_service "${package/etcd-server/etcd}" ;;
        esac
    done
}

# A service that came with a package which we have just installed: not running (a policy
# of the owner's may have let it), and not started at the next boot either.
hold_service() {
    {
        service "$1" stop
        systemctl disable "$1"
        update-rc.d "$1" disable
    } >/dev/null 2>&1 || true
}

ensure() {
    local package missing=()
    if ! command -v dpkg-query >/dev/null; then
        echo "farmem: not a Debian system; needed, under Debian's names: $*" >&2
        return 0
    fi
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -eq 0 ]; then
        install_packages "${missing[@]}"
    else
        echo "farmem: missing: ${missing[*]}; install with: sudo apt-get install ${missing[*]}" >&2
    fi
}

main() {
    local python extra
    case "${1:-}" in
        python) find_python ;;
        build | test)
            python=$(find_python)
            mapfile -t extra < <(python_packages "$python")
            if [ "$1" = test ]; then
                extra+=("${TEST_PACKAGES[@]}" "${GUEST_PACKAGES[@]}" "${POOL_PACKAGES[@]}")
            fi
            ensure "${BUILD_PACKAGES[@]}" "${extra[@]}"
            ;;
        guest) ensure "${GUEST_PACKAGES[@]}" ;;
        *)
            echo "usage: tools/setup.sh build|test|guest|python" >&2
            return 2
            ;;
    esac
}

main "$@"
