# `make` alone lists the verbs.
SHELL := /bin/bash
.DELETE_ON_ERROR:
STACK ?= local
PYTHON ?= python3
ENTER = . .toolchain/env
ifeq ($(STACK),local)
ENTER += && . .local/env
CONFIG_FILE = --config-file .local/Pulumi.local.yaml
READY = .local/env
endif
export STACK

.PHONY: help
help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: run  ## set everything up, and bring the registry up on this machine's Docker; ends with a verified push and pull
	@$(ENTER) && python -m ops verify --docker

.PHONY: run
run: toolchain lab local  ## bring the local stack up
	@$(ENTER) && pulumi up --yes --skip-preview --stack $(STACK) $(CONFIG_FILE)

.PHONY: rm
rm: toolchain  ## take the local stack down, and end the project's own Docker daemon; the images stay
	@test ! -e .local/env || { $(ENTER) && { pulumi destroy --yes --skip-preview --stack $(STACK) $(CONFIG_FILE); }; }
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
build: toolchain lab local  ## build the registry's image for STACK
	@$(ENTER) && pulumi up --yes --skip-preview --stack $(STACK) $(CONFIG_FILE) --target '**RegistryImage**'

.PHONY: push
push: build  ## build the image, and push it where STACK's image.pushTo says

.PHONY: test
test: toolchain lab  ## run all tests
	@.venv/bin/python -m lab prepare
	@. .toolchain/env && pytest

.PHONY: lint
lint: .venv/complete  ## check style, types, scripts and workflows
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck hosts/*.sh toolchain/*.sh .ci/run
	.venv/bin/check-jsonschema --schemafile settings.schema.json Pulumi.*.yaml

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

.local/env: | toolchain
	@toolchain/local-stack.sh

.PHONY: clean
clean: rm  ## take the local stack down, and remove what make made; DELETE_IMAGES=yes removes the images too
	@.venv/bin/python -m lab down kubernetes
	@if [ -n "$$(ls -A .lab/docker/data/volumes 2>/dev/null)" ] && [ "$(DELETE_IMAGES)" != yes ]; then \
	  echo "kept: .lab, with the registry's images, and .local, with its keys; make clean DELETE_IMAGES=yes removes them"; \
	else rm -rf .lab .local; fi
	@rm -rf .venv .toolchain .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/complete: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -e .venv/bin/pip || $(PYTHON) -m venv .venv
	@echo "installing requirements-dev.txt into .venv"
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
