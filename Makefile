# `make` alone lists the verbs.
SHELL := /bin/bash
.DELETE_ON_ERROR:
STACK ?= local
PYTHON ?= python3
ENTER = . .toolchain/env
# What says "local" is about the local stack, whatever STACK says.
ENTER_LOCAL = . .toolchain/env && . .local/env && export STACK=local
LOCAL = --stack local --config-file .local/Pulumi.local.yaml
ifeq ($(STACK),local)
ENTER = $(ENTER_LOCAL)
CONFIG_FILE = --config-file .local/Pulumi.local.yaml
READY = local
endif
export STACK

.PHONY: help
help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: run  ## set everything up, and bring the registry up on this machine's Docker; ends with a verified push and pull
	@$(ENTER_LOCAL) && python -m ops verify --docker

.PHONY: run
run: toolchain lab local  ## bring the local stack up
	@$(ENTER_LOCAL) && pulumi up --yes --skip-preview $(LOCAL)

.PHONY: rm
rm: toolchain  ## take the local stack down, and end the project's own Docker daemon; the images stay
	@test ! -e .local/env || { $(ENTER_LOCAL) && pulumi destroy --yes --skip-preview $(LOCAL); }
	@.venv/bin/python -m lab down

.PHONY: verify
verify: toolchain $(READY)  ## check the registry of STACK as a client does
	@$(ENTER) && python -m ops verify

.PHONY: recover
recover: toolchain $(READY)  ## mend the state of STACK after an interrupted run
	@$(ENTER) && python -m ops recover

.PHONY: deploy
deploy: toolchain $(READY)  ## preview STACK, ask, and bring it up
	@$(ENTER) && pulumi up --stack $(STACK) $(CONFIG_FILE)

.PHONY: clear
clear: toolchain $(READY)  ## ask, and take STACK down
	@$(ENTER) && pulumi destroy --stack $(STACK) $(CONFIG_FILE)

.PHONY: build
build: toolchain lab $(READY)  ## build the registry's image for STACK, and push it where its image.pushTo says
	@$(ENTER) && pulumi up $(if $(filter local,$(STACK)),--yes) --skip-preview --stack $(STACK) $(CONFIG_FILE) --target '**RegistryImage**'

.PHONY: push
push: build  ## the same: a stack's image is pushed when it is built

.PHONY: test
test: toolchain lab  ## run all tests
	@.venv/bin/python -m lab prepare
	@# Two cores also run the clusters: a wait may run out under load. What fails is run once more, alone, and counts then. By its
	@# own name: with that of its group at the end pytest would not know it, and run everything.
	@. .toolchain/env && { pytest || { echo "once more, alone:"; sed -i 's/@[a-z_]*": true/": true/' .pytest_cache/v/cache/lastfailed; pytest -n0 --last-failed --last-failed-no-failures none; }; }

.PHONY: lab-test
lab-test: toolchain lab  ## run the tests on virtual nodes that mount the RBD image by their kernel: an hour
	@# What ends a worker that hangs has to come after the tests' own timeouts, which are longer here.
	@. .toolchain/env && EVERY_LINE=yes pytest -n0 -o faulthandler_timeout=4500 --timeout=1800 -k killed_at \
	  tests/engine/test_rbd_script.py tests/engine/test_client_trust.py
	@. .toolchain/env && pytest -n0 -o faulthandler_timeout=4500 --timeout=1800 tests/lab

.PHONY: lint
lint: .venv/complete  ## check style, types, scripts and workflows
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck hosts/*.sh toolchain/*.sh lab/guest/* .ci/*
	.venv/bin/check-jsonschema --schemafile settings.schema.json Pulumi.*.yaml
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/check-jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci docs/gitlab-ci.yml
	.venv/bin/zizmor --quiet --offline --persona auditor .github/workflows
	@# It finds shellcheck by PATH, for the commands in the workflows.
	actionlint=$$(.venv/bin/python -c 'from toolchain.programs import *; print(build(ACTIONLINT))') && \
	  PATH="$(CURDIR)/.venv/bin:$$PATH" "$$actionlint" .github/workflows/*.yml

.PHONY: schema
schema: .venv/complete  ## write settings.schema.json from settings.py
	.venv/bin/python settings.py > settings.schema.json

.PHONY: bench
bench: toolchain lab  ## measure against the engine's and the registry's own floors
	@. .toolchain/env && python -m bench

.PHONY: toolchain
toolchain: .venv/complete  ## get a Pulumi CLI and plugins, and say from where
	@.venv/bin/python -m toolchain

.PHONY: lab
lab: .venv/complete
	@.venv/bin/python -m lab up

.PHONY: local
local: toolchain
	@toolchain/local-stack.sh

.PHONY: clean
clean: rm  ## take the local stack down, and remove what make made; DELETE_IMAGES=yes removes the images too
	@.venv/bin/python -m lab down kubernetes
	@.venv/bin/python -m lab down nodes
	@.venv/bin/python -m lab down ceph
	@if [ "$(DELETE_IMAGES)" != yes ]; then \
	  echo "kept: .lab, with the registry's images, and .local, with its keys; make clean DELETE_IMAGES=yes removes them"; \
	elif ls .local/state/.pulumi/stacks/private-registry/*.json 2>/dev/null | grep -qv '/local\.json$$'; then \
	  echo "kept: .local, which has the state of other stacks: take them down first, or move their state"; exit 1; \
	else rm -rf .lab .local; fi
	@rm -rf .venv .toolchain .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/complete: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -e .venv/bin/pip || $(PYTHON) -m venv .venv
	@echo "installing requirements-dev.txt into .venv"
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
