#!/usr/bin/env bash
# guest.sh - runs a command on another Linux kernel: in a QEMU guest that has the host's files.
#
#   tools/guest.sh --setup [--suite SUITE] [--rdma]   fetch the kernel of a Debian suite, once
#   tools/guest.sh [OPTION]... -- CMD [ARG]...  boot it, run CMD in this folder, exit with its status
#
#   --suite SUITE     bookworm (Linux 6.1, the default), trixie (6.12), trixie-backports, ...
#   --rdma            bring up a Soft-RoCE device, rxe0 (needs iproute2 on the host), and have libibverbs and pyverbs
#   --link FOLDER:N   a network card, eth0, wired to that of the guest which is given the same FOLDER and the other N (0 or
#                     1): its address is 10.99.0.(N+1), and FARMEM_GUEST_LINK is N. With --rdma rxe0 sits on it
#   --memory SIZE     the guest's memory (default 2G)
#   --cpus N          its processors (default 2)
#   --timeout SECONDS how long the guest may take in all (default 600)
#   --log FILE        keep the kernel's log there, however CMD ends
#
# CMD runs as root with the caller's environment, FARMEM_GUEST=SUITE added, and without a network.
# The host's files are there at their places, read-only below a layer in memory: what CMD writes is
# gone at the end.  Everything is emulated, even where KVM is there (some machines' does not start a
# guest): system calls take five times as long, Python ten times.  Exit status: that of CMD; 124 when the time was up, 125 when there was no guest, or it died.
set -euo pipefail

tools=$(cd "$(dirname "$0")" && pwd)
LOG_LINES=100
suite=bookworm rdma="" link="" memory=2G cpus=2 timeout=600 log="" setup=""

fail() {
    echo "guest: $1; $2" >&2
    exit 125
}

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

value() {
    [ $# -ge 2 ] || fail "$1 lacks a value" "see: tools/guest.sh --help"
}

qemu_is_there() {
    command -v qemu-system-x86_64 >/dev/null && return
    [ "$(id -u)" -ne 0 ] || "$tools/setup.sh" guest
    command -v qemu-system-x86_64 >/dev/null ||
        fail "qemu-system-x86_64 is missing" "install it: apt-get install --no-install-recommends qemu-system-x86"
}

# What the guest's kernel unpacks and starts: busybox, modules, and guest_init.sh.
make_initramfs() {
    local tree=$work/tree number=0 module
    mkdir -p "$tree"/{bin,modules,proc,sys,dev,host,rdma,talk,layers}
    cp "$folder/busybox" "$tree/bin/busybox"
    cp "$tools/guest_init.sh" "$tree/init"
    chmod 755 "$tree/init"
    for module in "$folder"/modules/*.ko ${link:+"$folder"/link/*.ko} ${rdma:+"$folder"/rdma/*.ko}; do
        number=$((number + 1))
        cp "$module" "$tree/modules/$(printf %03d $number).ko"
    done
    (cd "$tree" && find . | "$folder/busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$work/initramfs"
}

# What the guest is told: in files, so that no word needs quoting twice.
write_talk() {
    mkdir "$work/talk"
    echo "rdma=$rdma link=$link" >"$work/talk/settings"
    {
        export -p
        printf 'export FARMEM_GUEST=%q FARMEM_GUEST_LINK=%q\n' "$suite" "$link"
        [ -z "$rdma" ] || printf 'export PYTHONPATH=%q\n' "$rdma_folder/usr/lib/python3/dist-packages${PYTHONPATH:+:$PYTHONPATH}"
        printf 'cd %q || exit 125\n' "$PWD"
        printf 'ulimit -l unlimited\nexec'
        printf ' %q' "$@"
        echo
    } >"$work/talk/command"
}

# Both streams go through a pipe of ours, which qemu opens by name whatever the caller's are.
run_qemu() {
    local status=0 out err
    local more=(-nic none)
    if [ -n "$link" ]; then
        more=(-device "virtio-net-pci,netdev=wire,mac=52:54:00:99:00:0$link,host_mtu=4200,romfile="
            -netdev "dgram,id=wire,local.type=unix,local.path=$wire/$link,remote.type=unix,remote.path=$wire/$((1 - link))")
    fi
    if [ -n "$rdma" ]; then
        more+=(-fsdev "local,id=rdma,path=$rdma_folder,security_model=none,readonly=on" -device virtio-9p-pci,fsdev=rdma,mount_tag=rdma)
    fi
    exec {out}> >(exec cat)
    local out_pid=$!
    exec {err}> >(exec cat >&2)
    local err_pid=$!
    timeout --kill-after=5 "$timeout" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
        -accel tcg,thread=multi -cpu max,la57=off -smp "$cpus" -m "$memory" "${more[@]}" -kernel "$folder/vmlinuz" -initrd "$work/initramfs" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable nowatchdog rcupdate.rcu_cpu_stall_suppress=1 rdinit=/init" \
        -serial "file:$work/console" -device virtio-serial-pci \
        -chardev "file,id=out,append=on,path=/proc/self/fd/$out" -device virtserialport,chardev=out,name=out \
        -chardev "file,id=err,append=on,path=/proc/self/fd/$err" -device virtserialport,chardev=err,name=err \
        -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap -device virtio-9p-pci,fsdev=host,mount_tag=host \
        -fsdev "local,id=talk,path=$work/talk,security_model=none" -device virtio-9p-pci,fsdev=talk,mount_tag=talk \
        </dev/null >"$work/qemu" 2>&1 &
    qemu=$!
    wait "$qemu" || status=$?
    qemu=""
    exec {out}>&- {err}>&-
    wait "$out_pid" "$err_pid" || true
    return "$status"
}

# What the kernel said since the command started; all that there is if it never did.
show_log() {
    local file
    echo "guest: the kernel's log:" >&2
    for file in "$work/qemu" "$work/console" "$work/talk/log"; do
        [ ! -s "$file" ] || sed '1,/guest: the command starts/d' "$file" | grep -v 'reboot: Power down' | tail -n "$LOG_LINES" >&2
    done
}

clean_up() {
    if [ -n "${qemu:-}" ]; then
        kill "$qemu" 2>/dev/null || true
        wait "$qemu" 2>/dev/null || true
    fi
    rm -rf "$work"
}

run() {
    local status=0 ended
    folder=$tools/../build/guest/$suite
    [ -e "$folder/version" ] || fail "there is no kernel of Debian $suite yet" "fetch it: tools/guest.sh --setup --suite $suite"
    [ -z "$link" ] || [ -d "$folder/link" ] || fail "the kernel of Debian $suite was fetched without its network card" "fetch it again: tools/guest.sh --setup --suite $suite"
    [ -z "$rdma" ] || [ -d "$rdma_folder" ] || fail "there is no libibverbs for the guest yet" "fetch it: tools/guest.sh --setup --rdma --suite $suite"
    [ -z "$rdma" ] || command -v rdma >/dev/null || fail "the program rdma is missing" "install it: apt-get install iproute2"
    work=$(mktemp -d) qemu=""
    trap clean_up EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    touch "$work/console"
    make_initramfs
    write_talk "$@"
    run_qemu || status=$?
    [ -z "$log" ] || cat "$work/console" "$work/talk/log" >"$log" 2>/dev/null || true
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        show_log
        echo "guest: the guest was ended after $timeout s; give it more: --timeout SECONDS" >&2
        return 124
    fi
    if [ ! -s "$work/talk/status" ]; then
        show_log
        fail "the guest died before its command ended (qemu: $status)" "see the log above"
    fi
    ended=$(cat "$work/talk/status")
    [ "$ended" -eq 0 ] || show_log
    return "$ended"
}

while [ $# -gt 0 ]; do
    case $1 in
        --setup) setup=yes ;;
        --suite) value "$@"; suite=$2; shift ;;
        --rdma) rdma=yes ;;
        --link) value "$@"; link=${2##*:} wire=${2%:*}; shift ;;
        --memory) value "$@"; memory=$2; shift ;;
        --cpus) value "$@"; cpus=$2; shift ;;
        --timeout) value "$@"; timeout=$2; shift ;;
        --log) value "$@"; log=$2; shift ;;
        -h | --help) usage; exit 0 ;;
        --) shift; break ;;
        *) fail "there is no option $1" "see: tools/guest.sh --help" ;;
    esac
    shift
done
[[ $link =~ ^[01]?$ ]] || fail "--link ends neither with :0 nor with :1" "write it as --link FOLDER:0"
[ -z "$link" ] || wire=$(mkdir -p "$wire" && cd "$wire" && pwd)
rdma_folder=$(cd "$tools/.." && pwd)/build/guest/rdma
qemu_is_there
if [ -n "$setup" ]; then
    "$tools/guest_kernel.sh" "$suite" "$(cd "$tools/.." && pwd)/build/guest/$suite"
    [ -z "$rdma" ] || "$tools/guest_rdma.sh" "$rdma_folder"
    [ $# -gt 0 ] || exit 0
fi
[ $# -gt 0 ] || fail "there is no command to run" "type: tools/guest.sh -- CMD ARG..."
run "$@"
