#!/bin/sh
# Undo trust-install.sh: remove what it wrote for REGISTRY, and nothing else. Safe to run again at any time.
set -eu
mark="# private-registry $REGISTRY"
folder=/etc/docker/certs.d/$REGISTRY
hosts=/etc/hosts

if [ -e "$folder/ca.crt" ] && grep -qxF "$mark" "$folder/ca.crt"; then
  rm -f "$folder/ca.crt"
fi
rm -f "$folder"/.ca.crt.* # of an install that was cut off
rmdir "$folder" /etc/docker/certs.d 2>/dev/null || true
if grep -qF " $mark" "$hosts"; then
  exec 9>>"$hosts"
  flock 9
  # Written in place: in a container the hosts file is a mount that cannot be replaced.
  kept=$(grep -vF " $mark" "$hosts" || true)
  printf '%s\n' "$kept" >"$hosts"
fi
