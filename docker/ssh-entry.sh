#!/usr/bin/env bash
# Starts an ssh server of this user, then the command. All keys are made here: one of this host, which stays in the
# container, and one of the run, made by the first container that comes, in the folder /keys that all of them mount.
set -euo pipefail
keys=${SSH_KEYS:-/keys}
own=$HOME/.sshd
[[ -w $keys ]] || {
    echo "error: $keys cannot be written by user $(id -u): mount one volume there on all nodes, owned by that user" >&2
    exit 2
}

(umask 077 && mkdir -p "$own")
[[ -f $own/host_key ]] || ssh-keygen -q -t ed25519 -N '' -C "$(hostname)" -f "$own/host_key"
(
    flock 9
    [[ -f $keys/id_ed25519 ]] || ssh-keygen -q -t ed25519 -N '' -C sparsek -f "$keys/id_ed25519"
    # Under all names that the others may call this host by; what an earlier container left under them goes.
    read -ra names <<<"$(hostname) $(hostname -i)"
    touch "$keys/known_hosts"
    for name in "${names[@]}"; do
        awk -v old="[$name]:2222" '$1 != old' "$keys/known_hosts" >"$keys/known_hosts.new"
        echo "[$name]:2222 $(cut -d ' ' -f 1,2 "$own/host_key.pub")" >>"$keys/known_hosts.new"
        mv "$keys/known_hosts.new" "$keys/known_hosts"
    done
) 9>"$keys/lock"

cat >"$own/sshd_config" <<END
Port 2222
HostKey $own/host_key
AuthorizedKeysFile $keys/id_ed25519.pub
PidFile $own/pid
AllowUsers $(id -un)
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
X11Forwarding no
AllowTcpForwarding no
END
/usr/sbin/sshd -f "$own/sshd_config" -E "$own/log"
exec "$@"
