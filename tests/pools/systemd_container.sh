#!/bin/bash
# systemd_container.sh - a real systemd with our units and nothing else, in namespaces of its own.
#
#   unshare --mount --pid --cgroup --uts --ipc --fork --kill-child systemd_container.sh ROOT PYTHON SITE OUT INNER
#
# ROOT is the checkout, PYTHON the prefix of an interpreter, SITE its packages; OUT is a folder for what
# comes of it: the script INNER runs once the units are up, its words go to OUT/log.  The host's files are seen
# through an overlay whose changes are gone in the end; /proc/sys and /sys can't be written to.
set -euo pipefail
root=$1 python=$2 site=$3 out=$4 inner=$5

mount --make-rprivate /
mkdir "$out/over"
mount -t tmpfs tmpfs "$out/over"
mkdir "$out"/over/{upper,work,root}
there=$out/over/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$out/over/upper,workdir=$out/over/work" "$there"

mount -t proc proc "$there/proc"
mount --bind "$there/proc/sys" "$there/proc/sys"
mount -o remount,bind,ro "$there/proc/sys"
mount -t sysfs -o ro sysfs "$there/sys"
mount -t cgroup2 cgroup2 "$there/sys/fs/cgroup"
for folder in run tmp dev; do
    mount -t tmpfs tmpfs "$there/$folder"
done
mkdir "$there/dev/shm" "$there/dev/pts"
for device in null zero full random urandom tty; do
    touch "$there/dev/$device"
    mount --bind "/dev/$device" "$there/dev/$device"
done
ln -s /proc/self/fd "$there/dev/fd"

# The service may see neither /tmp nor anybody's home, so everything is put elsewhere.
mkdir -p "$there"/opt/{python,site,farmem,out} "$there/etc/farmem" "$there/units"
mount --bind "$python" "$there/opt/python"
mount --bind "$site" "$there/opt/site"
mount --bind "$out" "$there/opt/out"
cp -r "$root/farmem" "$there/opt/farmem/"
cp "$site"/farmem/*.so "$there/opt/farmem/farmem/"
cat >"$there/usr/local/bin/farmem" <<'END'
#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONHOME=/opt/python PYTHONPATH=/opt/farmem:/opt/site PYTHONDONTWRITEBYTECODE=1
exec /opt/python/bin/python3 -c 'import sys; from farmem.cli import main; sys.exit(main())' "$@"
END
chmod 755 "$there/usr/local/bin/farmem"

cp "$root"/systemd/farmem-server.{service,socket} "$there/units"
mkdir "$there/units/farmem-server.service.d"
printf '[Service]\nStandardError=append:/opt/out/service\n' >"$there/units/farmem-server.service.d/log.conf"
sed 's/^capacity.*/capacity = "64M"/' "$root/systemd/farmem.example.toml" >"$there/etc/farmem/farmem.toml"
cat "$root/systemd/farmem.sysusers.conf" >"$there/usr/lib/sysusers.d/farmem.conf"
chroot "$there" systemd-sysusers farmem.conf
cp "$inner" "$there/opt/inner.sh"
for target in sysinit basic sockets network-online shutdown multi-user umount final; do
    printf '[Unit]\nDefaultDependencies=no\n' >"$there/units/$target.target"
done
printf '[Unit]\nDefaultDependencies=no\nWants=inner.service\n' >"$there/units/go.target"
cat >"$there/units/inner.service" <<'END'
[Unit]
DefaultDependencies=no
Wants=farmem-server.service
After=farmem-server.service
[Service]
Type=oneshot
ExecStart=/bin/bash -c 'bash -x /opt/inner.sh >/opt/out/log 2>&1; echo "$?" >/opt/out/done'
END
exec chroot "$there" /usr/bin/env -i container=farmem-test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/units \
    /lib/systemd/systemd --system --unit=go.target --show-status=0
