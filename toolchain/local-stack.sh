#!/bin/sh
# Make what the local stack keeps in .local: its state, a passphrase, and its configuration with the encryption salt, which
# Pulumi would otherwise write into the tracked Pulumi.local.yaml. Safe to run again.
set -eu
umask 077
mkdir -p .local/state
if [ ! -s .local/passphrase ]; then
  head -c 32 /dev/urandom | base64 >.local/passphrase.new
  mv .local/passphrase.new .local/passphrase
fi
# A backend or passphrase that the user has set is used instead.
cat >.local/env <<EOF2
if [ -z "\${PULUMI_BACKEND_URL:-}" ]; then export PULUMI_BACKEND_URL="file://$PWD/.local/state"; fi
if [ -z "\${PULUMI_CONFIG_PASSPHRASE:-}\${PULUMI_CONFIG_PASSPHRASE_FILE:-}" ]; then
  export PULUMI_CONFIG_PASSPHRASE_FILE="$PWD/.local/passphrase"
fi
EOF2
# shellcheck source=/dev/null
. .toolchain/env
# shellcheck source=/dev/null
. .local/env
cp Pulumi.yaml .local/Pulumi.yaml
# A command without --config-file may have written a salt into the tracked file, too: this one is of the state.
salt=$(grep -m 1 '^encryptionsalt:' .local/Pulumi.local.yaml 2>/dev/null || true)
{
  echo "# Made from Pulumi.local.yaml in the project's folder at each make: change that one."
  sed '/^encryptionsalt:/d' Pulumi.local.yaml
  [ -z "$salt" ] || echo "$salt"
} >.local/Pulumi.local.yaml.new
mv .local/Pulumi.local.yaml.new .local/Pulumi.local.yaml
# Each time: the user may have set another backend since.
pulumi --non-interactive -C .local stack select --create local >/dev/null
