#!/bin/bash
# systemd_inside.sh - what tests/pools/test_serve_systemd.py does beside the service: use it, look at it, stop it.
set -euo pipefail
pool=/run/farmem/pool.sock
ask() { curl -sS --fail-with-body --unix-socket "$pool" "$@"; }
show() { systemctl show -P "$1" "${2:-farmem-server.service}"; }
field() { sed -n "s/^ *\"$1\": \"\(.*\)\",*$/\1/p"; }

[ "$(show ActiveState)" = active ]
[ "$(show StatusText)" = "lending 64.0 MiB" ]
[ "$(show NRestarts)" = 0 ]
[ "$(stat -c '%a %U %G' "$pool" "$pool.nbd" | sort -u)" = "660 root farmem" ]

# Nobody in particular, without capabilities, behind filters.
status=/proc/$(show MainPID)/status
[ "$(sed -n 's/^Uid:\t\([0-9]*\).*/\1/p' "$status")" -ge 61184 ]
grep -q "^CapEff:.0*$" "$status"
grep -q "^CapBnd:.0*$" "$status"
grep -q "^NoNewPrivs:.1$" "$status"
grep -q "^Seccomp:.2$" "$status"
# And with RDMA it may pin all that it lends.
[ "$(show LimitMEMLOCK)" = infinity ]
show DeviceAllow | grep -qx "char-infiniband_verbs rw"

lease=$(ask -d '{"bytes": 33554432}' http://pool/v1/leases)
token=$(field token <<<"$lease") id=$(field lease <<<"$lease")
head -c 33554432 /dev/urandom >/tmp/there
nbdcopy /tmp/there "nbd+unix:///$token?socket=$pool.nbd"
nbdcopy "nbd+unix:///$token?socket=$pool.nbd" /tmp/back
cmp /tmp/there /tmp/back

# A stop drains: it goes on until the lease has ended, and its data is served as long.
systemctl stop --no-block farmem-server.service
until ask http://pool/healthz | grep -q draining; do sleep 0.1; done
nbdcopy "nbd+unix:///$token?socket=$pool.nbd" /tmp/again
cmp /tmp/there /tmp/again
[ "$(show ActiveState)" = deactivating ]
ask -X DELETE -H "Authorization: Bearer $token" "http://pool/v1/leases/$id"
while [ "$(show ActiveState)" = deactivating ]; do sleep 0.1; done
[ "$(show ActiveState) $(show Result) $(show ExecMainStatus)" = "inactive success 0" ]
if ps -eo args | grep "^nbdkit"; then exit 1; fi
while [ "$(show ActiveState farmem-server.socket)" != inactive ]; do sleep 0.1; done
[ ! -e "$pool" ]

# And it can be started again, and dies of a failure only to be started by systemd.
systemctl start farmem-server.service
before=$(ask http://pool/v1/server | field epoch)
kill -KILL "$(show MainPID)"
until [ "$(show NRestarts)" = 1 ] && [ "$(show ActiveState)" = active ]; do sleep 0.1; done
[ "$(ask http://pool/v1/server | field epoch)" != "$before" ]
