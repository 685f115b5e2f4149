#!/bin/bash
# Copy an image from the Docker daemon to the containerd of every node, over SSH. Safe to run again: a node that has it
# already is left alone. All nodes at once; those that fail are named, and do not hold the others back.
#
# stdin      the private key for all nodes; it is kept in an agent's memory alone
# IMAGE      the image in the daemon
# REFERENCE  its full name on the nodes
# NODES      a line for each node: user, address, port, and the two words of its host key
#
# exit 1: a node failed; exit 2: the key cannot be used.
set -euo pipefail
umask 077
folder=$(mktemp -d)
trap 'ssh-agent -k >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
eval "$(ssh-agent -s -a "$folder/agent")" >/dev/null
# A stack's configuration strips the end of the key's last line, without which it is not read.
if ! { cat; echo; } | ssh-add -q - 2>"$folder/said"; then
  echo "private-registry:sshPrivateKey cannot be used: $(cat "$folder/said")" >&2
  exit 2
fi
docker tag "$IMAGE" "$REFERENCE"

deliver() {
  local user=$1 address=$2 port=$3 host_key=$4 known=$folder/known-$2-$3 ctr="ctr --namespace k8s.io images"
  echo "[$address]:$port $host_key" >"$known"
  [ "$port" != 22 ] || echo "$address $host_key" >"$known"
  [ "$user" = root ] || ctr="sudo -n $ctr"
  remote=(ssh -o BatchMode=yes -o ConnectTimeout=15 -o StrictHostKeyChecking=yes -o "UserKnownHostsFile=$known"
    -o ServerAliveInterval=15 -p "$port" "$user@$address")
  if ! there=$("${remote[@]}" "$ctr list --quiet name==$REFERENCE" </dev/null); then return 1; fi
  [ -z "$there" ] || return 0
  docker save "$REFERENCE" | "${remote[@]}" "$ctr import -" >/dev/null
}

declare -A running
while read -r user address port host_key; do
  deliver "$user" "$address" "$port" "$host_key" 2>"$folder/said-$address-$port" &
  running[$address-$port]=$!
done <<<"$NODES"
failed=0
for node in "${!running[@]}"; do
  if ! wait "${running[$node]}"; then
    echo "${node%-*}: the image was not delivered: $(tail -n 2 "$folder/said-$node")" >&2
    failed=1
  fi
done
exit $failed
