#!/bin/sh
# One machine's trust in the registry: `trust.sh install`, `remove`, `status` or `hold`. Safe to run again at any time, also
# after an interruption. It runs on hosts and in a container: a POSIX shell and what busybox has.
#
# AUTHORITIES   install: the certificates, in PEM, of the authorities to trust
# STACK         project and stack: what one stack wrote, no other one changes
# REGISTRY      host and port of the registry
# ENTRY         whose trust this is within the stack: what another one has taken over since is not removed with this one
# RUNTIME       docker, containerd, or none where only the name is resolved
# RESOLVE_TO    an address: write a line for the name into the hosts file; empty: do not
# RESTART       containerd: a command that restarts it, so that its config_path may be set; empty: leave it as it is
# CERTS_FOLDER  containerd: the folder that its config_path names; empty: ask containerd
# HANDSHAKE     yes: connect to the registry at the end
#
# An install that fails takes back what it wrote where nothing was there before. Its exit codes: 3: something is in the way
# that this stack did not write; 4: no permission; 5: containerd is not set up for this; 6: the registry is not reached, or
# its certificate is refused; 7: a file cannot be written.
set -eu
: "${AUTHORITIES:=}" "${RESOLVE_TO:=}" "${RESTART:=}" "${CERTS_FOLDER:=}" "${HANDSHAKE:=no}"
# What sudo leaves of it may lack the folder that containerd's own archive is for.
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin
umask 022
mark="# private-registry $STACK $REGISTRY"
host=${REGISTRY%:*}
hosts=/etc/hosts
configuration=/etc/containerd/config.toml
default_folder=/etc/containerd/certs.d
tries=4
first=no

fail() {
  code=$1
  shift
  echo "$*" >&2
  exit "$code"
}

# Wait for the lock of an open file; where there is no flock, as in a small image, there is none.
wait_for_lock() { ! command -v flock >/dev/null || flock "$1"; }

# Keep every other run on this machine waiting. A folder can be locked, too, and that leaves no file behind.
lock() {
  exec 8</etc
  wait_for_lock 8
}

unlock() { exec 8<&-; }

# Whether a file has this stack's mark, with whatever entry.
is_of_stack() {
  awk -v mark="$mark" '$0 == mark || index($0, mark " ") == 1 { found = 1 } END { exit !found }' "$1"
}

# Make what is on stdin the content of a file, at once or not at all.
write() {
  if ! { cat >"$1.new" && chmod 0644 "$1.new"; } 2>/dev/null; then
    rm -f "$1.new"
    fail 7 "$1 cannot be written: see whether its disk is full or read-only."
  fi
  if cmp -s "$1.new" "$1"; then rm "$1.new"; else mv "$1.new" "$1"; fi
}

# Print containerd's whole configuration: by its file, or by another one ($1).
dump() {
  if [ -e "${1:-$configuration}" ]; then
    containerd --config "${1:-$configuration}" config dump
  else
    containerd config default
  fi
}

# Print the folder that comes first in the config_path of containerd's CRI plugin, in a whole configuration ($1): by version 2
# that plugin is io.containerd.grpc.v1.cri, by version 3 io.containerd.cri.v1.images.
config_path() {
  echo "$1" | awk '
    { gsub(/["'\'']/, "") }
    /^[ \t]*\[/ { within = /^[ \t]*\[plugins\.io\.containerd\.(grpc\.v1\.cri|cri\.v1\.images)\.registry\][ \t]*$/ }
    within && $1 == "config_path" { split($3, folders, ":"); print folders[1] }'
}

version() {
  echo "$1" | awk -F= '/^[ \t]*version[ \t]*=/ { gsub(/[ \t\r]/, "", $2); print $2; exit }'
}

# Restart containerd with the configuration that was changed, or give it back the old one, which `.before` has (empty: none).
# As long as `.before` is there, the restart is still to be done, by whichever run comes next.
restart() {
  # Without the lock, which a containerd that is started by it would keep.
  if said=$(sh -c "$RESTART" 2>&1 8<&-); then
    rm -f "$configuration.before" "$configuration.changed" "$configuration.unfinished"
    return
  fi
  if [ -s "$configuration.before" ]; then
    mv "$configuration.before" "$configuration"
  else
    rm -f "$configuration" "$configuration.before"
  fi
  sh -c "$RESTART" >/dev/null 2>&1 8<&- || true
  fail 5 "\`$RESTART\` failed${said:+ ($(echo "$said" | tail -n 1))}, so that containerd has its old configuration again. $mend."
}

set_config_path() {
  [ -n "$RESTART" ] ||
    fail 5 "containerd's config_path is empty, so that it looks for no registry's authority. $mend; or let this do so: write restart."
  # containerd does not load its CRI plugin where these are set, too.
  if echo "$whole" | grep -Eq '\.registry\.(mirrors\.|configs\..*\.tls)'; then
    fail 5 "containerd's configuration has registry.mirrors or registry.configs with tls, which exclude config_path: move them to $default_folder. $mend."
  fi
  if [ -s "$configuration" ]; then
    is_version=$(version "$(cat "$configuration")")
  else
    is_version=$(version "$whole")
  fi
  case $is_version in
    2) plugin=io.containerd.grpc.v1.cri ;;
    3) plugin=io.containerd.cri.v1.images ;;
    *) fail 5 "$configuration is of version ${is_version:-1}, which this does not change. $mend." ;;
  esac
  if [ -s "$configuration" ]; then
    # First, so that the changed file has the owner and the rights of the old one.
    cp -p "$configuration" "$configuration.changed"
    cp -p "$configuration" "$configuration.unfinished"
  else
    mkdir -p "${configuration%/*}"
    : >"$configuration.unfinished"
  fi
  {
    if [ -s "$configuration" ]; then cat "$configuration"; else echo "version = $is_version"; fi
  } | awk -v plugin="$plugin" -v folder="$default_folder" '
    function set() { printf "  config_path = \"%s\"\n", folder; done = 1 }
    /^[ \t]*\[/ {
      header = $0; gsub(/[ \t\r"'\'']/, "", header)
      within = header == "[plugins." plugin ".registry]"
      print
      if (within) set()
      next
    }
    within && /^[ \t]*config_path[ \t]*=/ { next }
    { print }
    END { if (!done) { printf "\n[plugins.\"%s\".registry]\n", plugin; set() } }' >"$configuration.changed"
  # What containerd makes of it is what counts: a table may have been written in a form that is not seen here.
  changed=$(dump "$configuration.changed" 2>/dev/null) || changed=
  if [ "$(config_path "$changed")" != "$default_folder" ]; then
    rm -f "$configuration.changed" "$configuration.unfinished"
    fail 5 "containerd does not take the changed configuration. $mend."
  fi
  mv "$configuration.unfinished" "$configuration.before"
  mv "$configuration.changed" "$configuration"
  restart
}

# Set `base` and `folder` to where the runtime looks for authorities, and for this registry's; `base` is empty where
# containerd looks nowhere.
find_folder() {
  base=$CERTS_FOLDER
  case $RUNTIME in
    docker) base=/etc/docker/certs.d ;;
    containerd)
      if [ -z "$base" ]; then
        command -v containerd >/dev/null ||
          fail 5 "There is no containerd on PATH: correct the host's runtime. (That of k3s and RKE2 is set up by their registries.yaml.)"
        whole=$(dump 2>/dev/null) || fail 5 "containerd cannot read its configuration: see \`containerd config dump\`."
        base=$(config_path "$whole")
      fi
      ;;
    none) return ;;
  esac
  folder=${base:-$default_folder}/$REGISTRY
}

# Print the addresses that the hosts file has for the name in lines that are not of this stack.
foreign_addresses() {
  awk -v name="$host" -v address="$RESOLVE_TO" -v mark=" $mark" '
    !index($0, mark) { sub(/\r$/, ""); sub(/#.*/, ""); for (i = 2; i <= NF; i++) if ($i == name && $1 != address) print $1 }' "$hosts"
}

# Print the hosts file without this entry's lines, or ($1: any) without those of any entry of this stack's registry. What an
# interrupted run left at the end, blanks, goes as well.
hosts_without() {
  awk -v mark=" $mark" -v entry="$1" '
    function is_own(rest) { return rest == "" || (entry == "any" ? rest ~ /^ / : rest == " " entry) }
    /^ +$/ { next }
    { text = $0; sub(/\r$/, "", text); at = index(text, mark) }
    !(at && is_own(substr(text, at + length(mark))))' "$hosts"
}

# Make a text the content of the hosts file, which stays the same file: in a container it is a mount that cannot be replaced.
# It is written over what is there, with blanks up to its end, so that at no moment anything of it is missing.
write_hosts() {
  size=$(printf '%s\n' "$1" | wc -c)
  rest=$(($(wc -c <"$hosts") - size))
  printf '%s\n%*s' "$1" "$((rest > 0 ? rest : 0))" '' 1<>"$hosts"
  truncate -s "$size" "$hosts"
}

# Connect with the authorities of a file alone. Sets `said`; returns 1 where it fails, 2 where it cannot be tried.
handshake() {
  left=$tries
  until connect "$1"; do
    [ "$code" -ne 2 ] || return 2
    left=$((left - 1))
    # A registry that has just been started may not listen yet; a wrong certificate stays wrong.
    if [ $left -eq 0 ] || [ "$code" -eq 60 ]; then return 1; fi
    sleep 1
  done
  said="the registry is reached and trusted"
}

connect() {
  code=0
  if command -v curl >/dev/null; then
    # Neither the user's settings nor the system's authorities count: the second by a folder that is not there.
    said=$(curl -q --silent --show-error --noproxy '*' --cacert "$1" --capath /nonexistent --connect-timeout 5 --max-time 20 \
      --output /dev/null "https://$REGISTRY/v2/" 2>&1) || code=$?
    said=$(echo "$said" | head -n 1)
    if [ $code -eq 2 ]; then code=1; fi
  elif command -v openssl >/dev/null; then
    said=$(timeout 20 openssl s_client -connect "$REGISTRY" -servername "$host" -verify_hostname "$host" \
      -verify_return_error -CAfile "$1" </dev/null 2>&1 >/dev/null) || code=1
    said=$(echo "$said" | tail -n 1)
  else
    said="not tried, as neither curl nor openssl is there"
    code=2
  fi
  return $code
}

# Take this entry's files from a folder.
clear_folder() {
  # containerd takes certificates for the registry's also without hosts.toml, so that it goes first.
  for file in "$1/hosts.toml" "$1/ca.crt"; do
    if [ -e "$file" ] && { grep -qxF "$mark $ENTRY" "$file" || grep -qxF "$mark" "$file"; }; then rm -f "$file"; fi
    rm -f "$file.new" # of an install that was cut off
  done
  rmdir "$1" 2>/dev/null && rmdir "${1%/*}" 2>/dev/null || true
}

clear_hosts() {
  kept=$(hosts_without "$ENTRY")
  there=$(cat "$hosts")
  [ "$kept" != "$there" ] || return 0
  # Other programs that take a lock take this one.
  exec 9>>"$hosts"
  wait_for_lock 9
  kept=$(hosts_without "$ENTRY")
  write_hosts "$kept"
  exec 9>&-
}

remove() {
  lock
  # A containerd that is gone, or cannot read its configuration, keeps nothing from going.
  (find_folder && [ -n "$folder" ] && clear_folder "$folder") 2>/dev/null || true
  if [ "$RUNTIME" = containerd ]; then clear_folder "$default_folder/$REGISTRY"; fi
  clear_hosts
  unlock
}

undo() {
  code=$?
  if [ "$first" = yes ]; then
    first=no
    unlock
    remove
  fi
  exit $code
}

install() {
  lock
  find_folder
  mend="Set config_path = \"$default_folder\" in $configuration under [plugins.\"io.containerd.grpc.v1.cri\".registry] \
(version 3: [plugins.\"io.containerd.cri.v1.images\".registry]), and restart containerd"
  # Everything that may refuse comes before anything that writes.
  if [ -n "$folder" ]; then
    for file in "$folder/ca.crt" "$folder/hosts.toml"; do
      if [ -e "$file" ] && ! is_of_stack "$file"; then
        fail 3 "$file is there already and is not of this registry's stack: move it away, or take this machine out of private-registry:trust."
      fi
    done
  fi
  if [ -n "$RESOLVE_TO" ]; then
    [ -w "$hosts" ] ||
      fail 4 "$hosts cannot be written: run this as root, or let $host resolve to $RESOLVE_TO yourself."
    foreign=$(foreign_addresses | head -n 1)
    [ -z "$foreign" ] ||
      fail 3 "$hosts has $host at $foreign already, in a line that is not of this stack: remove it, or do not ask for one."
  fi
  if [ "$RUNTIME" = containerd ] && [ -z "$CERTS_FOLDER" ]; then
    if [ -z "$base" ]; then
      set_config_path
    elif [ -e "$configuration.before" ]; then
      [ -n "$RESTART" ] || fail 5 "containerd was not restarted since its config_path was set: restart it, and remove $configuration.before."
      restart
    fi
  fi
  trap undo EXIT
  if [ -n "$folder" ]; then
    there=no
    if [ -e "$folder/ca.crt" ]; then there=yes; fi
    said=$(mkdir -p "$folder" 2>&1) ||
      fail 4 "$folder cannot be made ($said): run this as root, or copy the stack output authorityCertificate there yourself."
    if [ $there = no ]; then first=yes; fi
    printf '%s\n%s\n' "$mark $ENTRY" "$AUTHORITIES" | write "$folder/ca.crt"
  fi
  if [ "$RUNTIME" = containerd ]; then
    # https://github.com/containerd/containerd/blob/main/docs/hosts.md: what is not within [host] is of the server itself,
    # which is asked last.
    write "$folder/hosts.toml" <<TOML
$mark $ENTRY
server = "https://$REGISTRY"
ca = "$folder/ca.crt"

[host."https://$REGISTRY"]
  capabilities = ["pull", "resolve", "push"]
  ca = "$folder/ca.crt"
TOML
  fi
  if [ -n "$RESOLVE_TO" ] && ! grep -qxF "$RESOLVE_TO $host $mark $ENTRY" "$hosts"; then
    exec 9>>"$hosts"
    wait_for_lock 9
    kept=$(hosts_without any)
    write_hosts "$kept
$RESOLVE_TO $host $mark $ENTRY"
    exec 9>&-
  fi
  unlock
  if [ "$HANDSHAKE" != yes ]; then
    said="not connected to the registry"
  elif ! handshake "$folder/ca.crt" && [ "$code" -ne 2 ]; then
    fail 6 "https://$REGISTRY cannot be used from this machine: $said. See that the name resolves (resolveTo) and that nothing is in the way."
  fi
  first=no
  trap - EXIT
  echo "${folder:-$hosts} is written; $said"
}

# Print what there is, a word and its value in each line, and then the authorities.
status() {
  find_folder
  echo "folder $folder"
  if [ -z "$base" ]; then echo "config_path empty"; fi
  if [ -e "$configuration.before" ] && [ "$RUNTIME" = containerd ]; then echo "config_path not read"; fi
  if [ ! -e "$folder/ca.crt" ]; then
    echo "trust absent"
    return
  fi
  trust=ours
  for file in "$folder/ca.crt" "$folder/hosts.toml"; do
    if [ -e "$file" ]; then
      is_of_stack "$file" || trust=foreign
    elif [ "$RUNTIME" = containerd ]; then
      trust=absent
    fi
  done
  echo "trust $trust"
  tries=1
  if handshake "$folder/ca.crt"; then
    echo "handshake ok"
  elif [ "$code" -eq 2 ]; then
    echo "handshake untried $said"
  else
    echo "handshake failed $said"
  fi
  cat "$folder/ca.crt"
}

# Install, again where others have taken it away, and remove when the pod that this runs in is told to end.
hold() {
  trap 'remove; exit 0' TERM
  install
  while :; do
    # Not where a later pod has taken it over.
    [ -e "$folder/hosts.toml" ] || install
    sleep 60 &
    wait $!
  done
}

main() {
  folder=
  base=
  "$1"
}

# The script itself may come by standard input, which nothing that it starts may read.
main "$1" </dev/null
