#!/bin/sh
# What the state of a stack calls that was last brought up before `trust.sh` was there.
if [ "$TRUST_DOCKER" = yes ]; then RUNTIME=docker; else RUNTIME=none; fi
ENTRY=trust RUNTIME=$RUNTIME exec "${0%/*}/trust.sh" remove
