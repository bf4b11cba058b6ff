#!/bin/busybox sh
# guest_init.sh - the first program of the guest of tools/guest.sh; runs on the guest's kernel alone.
#
# Puts a root together from the host's (read-only, over 9p) and a scratch layer in memory,
# runs /talk/command there, and leaves its status and the kernel's log in /talk, which the
# host reads.  Whoever dies on the way has left no status: the host says so.
/bin/busybox --install -s /bin
export PATH=/bin
root=/layers/root

give_up() {
    echo "guest: $1" >/dev/console
    dmesg >/talk/log
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do
    insmod "$module"
done

# The host's files don't change while a guest looks at them: what was read is kept.
options=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o $options talk /talk || give_up "nothing to talk to the host with"
. /talk/settings
mount -t 9p -o $options,ro,cache=loose host /host || give_up "the host's root can't be mounted"
mount -t tmpfs -o size=60% layers /layers
mkdir /layers/upper /layers/work $root
lower=/host
if [ -n "$rdma" ]; then
    mount -t 9p -o $options,ro,cache=loose rdma /rdma || give_up "there is no libibverbs"
    lower=/rdma:/host
fi
mount -t overlay -o lowerdir=$lower,upperdir=/layers/upper,workdir=/layers/work overlay $root ||
    give_up "no scratch layer"
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t tmpfs run $root/run
mount -t devtmpfs devtmpfs $root/dev
mkdir -p $root/dev/pts $root/dev/shm $root/run/guest
mount -t devpts -o ptmxmode=666 devpts $root/dev/pts
mount -t tmpfs shm $root/dev/shm
mount -o bind /talk $root/run/guest
ln -s /proc/self/fd $root/dev/fd
for name in stdin stdout stderr; do
    ln -s /proc/self/fd/$((number)) $root/dev/$name
    number=$((number + 1))
done
hostname guest
ip link set lo up

# The wire, or a network of our own; 4200: room for RoCE's largest packets.
if [ -n "$link$rdma" ]; then
    device=eth0
    [ -n "$link" ] || { device=rdma0; ip link add rdma0 type dummy; }
    echo 0 >/proc/sys/net/ipv6/conf/$device/accept_dad
    ip link set $device mtu 4200 up
    ip address add 10.99.0.$((link + 1))/24 dev $device
fi

# A Soft-RoCE device; its address for RoCE version 2 appears a moment after it.
if [ -n "$rdma" ]; then
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot $root rdma link add rxe0 type rxe netdev $device ||
        give_up "no Soft-RoCE device could be made"
    tries=0
    until grep -q 'ffff:' /sys/class/infiniband/rxe0/ports/1/gids/1 || [ $tries -eq 200 ]; do
        tries=$((tries + 1))
        usleep 20000
    done
fi

for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name") in
        out) out=/dev/${port##*/} ;;
        err) err=/dev/${port##*/} ;;
    esac
done
echo "guest: the command starts" >/dev/kmsg
chroot $root /bin/bash /run/guest/command </dev/null >"$out" 2>"$err"
echo $? >/talk/status
dmesg >/talk/log
poweroff -f
