#!/bin/sh
# Undo trust-install.sh: remove what it wrote for STACK and REGISTRY, and nothing else. Safe to run again at any time.
set -eu
mark="# private-registry $STACK $REGISTRY"
folder=/etc/docker/certs.d/$REGISTRY
hosts=/etc/hosts

if [ -e "$folder/ca.crt" ] && grep -qxF "$mark" "$folder/ca.crt"; then
  rm -f "$folder/ca.crt"
fi
rm -f "$folder"/.ca.crt.* # of an install that was cut off
rmdir "$folder" /etc/docker/certs.d 2>/dev/null || true
ours() {
  awk -v mark=" $mark" -v keep="$1" '
    { own = substr($0, length($0) - length(mark) + 1) == mark }
    own != keep' "$hosts"
}
if [ -n "$(ours 0)" ]; then
  exec 9>>"$hosts"
  flock 9
  # Written in place: in a container the hosts file is a mount that cannot be replaced.
  kept=$(ours 1)
  printf '%s\n' "$kept" >"$hosts"
fi
