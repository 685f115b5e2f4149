#!/bin/sh
# Make this machine's Docker daemon trust a registry, and resolve the registry's name. Safe to run again at any time.
#
# stdin         the authority's certificate in PEM
# STACK         project and stack: what one stack wrote, no other one changes
# REGISTRY      host and port of the registry
# TRUST_DOCKER  yes: write /etc/docker/certs.d/HOST:PORT/ca.crt, which Docker reads at each connection
# RESOLVE_TO    an address: write a line for HOST into the hosts file; empty: do not
#
# exit 3: a file or line is in the way that this program did not write; exit 4: no permission.
set -eu
mark="# private-registry $STACK $REGISTRY"
host=${REGISTRY%:*}
folder=/etc/docker/certs.d/$REGISTRY
file=$folder/ca.crt
hosts=/etc/hosts

fail() {
  code=$1
  shift
  echo "$*" >&2
  exit "$code"
}

authority=$(cat)
if [ "$TRUST_DOCKER" = yes ]; then
  mkdir -p "$folder" 2>/dev/null ||
    fail 4 "$folder cannot be made: run pulumi as root, or set private-registry:trust.docker to false and copy the stack output authorityCertificate there yourself."
  if [ -e "$file" ] && ! grep -qxF "$mark" "$file"; then
    fail 3 "$file is there already and is not of this registry's stack: move it away, or set private-registry:trust.docker to false."
  fi
  new=$(mktemp "$folder/.ca.crt.XXXXXX")
  trap 'rm -f "$new"' EXIT
  printf '%s\n%s\n' "$mark" "$authority" >"$new"
  chmod 0644 "$new"
  mv "$new" "$file"
fi
if [ -n "$RESOLVE_TO" ]; then
  [ -w "$hosts" ] ||
    fail 4 "$hosts cannot be written: run pulumi as root, or set private-registry:trust.hostsFile to false and let $host resolve to $RESOLVE_TO yourself."
  # Other stacks may write it at the same time.
  exec 9>>"$hosts"
  flock 9
  foreign=$(awk -v name="$host" -v address="$RESOLVE_TO" \
    '!/# private-registry / { sub(/#.*/, ""); for (i = 2; i <= NF; i++) if ($i == name && $1 != address) print $1 }' "$hosts")
  [ -z "$foreign" ] ||
    fail 3 "$hosts has $host at $(echo "$foreign" | head -n 1) already, in a line that is not of this program: remove it, or set private-registry:trust.hostsFile to false."
  if ! grep -qxF "$RESOLVE_TO $host $mark" "$hosts"; then
    # The last line may lack its end.
    [ -z "$(tail -c 1 "$hosts")" ] || echo >&9
    printf '%s\n' "$RESOLVE_TO $host $mark" >&9
  fi
fi
