# Names for people; the work is done by `cargo xtask` (see CONTRIBUTING.md).

CARGO ?= cargo
XTASK = $(CARGO) run --quiet --package xtask --

.PHONY: help up down test deps clean-host fmt lint bench rig-test

help:
	@echo "make up          build, install and start Spore, deploy examples/hello"
	@echo "make down        stop all VMs and the daemon"
	@echo "make test        the whole test suite"
	@echo "make deps        fetch everything from outside, once"
	@echo "make clean-host  remove everything that up and deps put on this machine"
	@echo "make rig-test    the tests that need KVM, in a machine that QEMU emulates"
	@echo "make fmt | lint | bench"

up:
	@$(XTASK) up

down:
	@$(XTASK) down

test:
	@$(XTASK) test

deps:
	@$(XTASK) deps

clean-host:
	@$(XTASK) clean-host

fmt:
	@$(CARGO) fmt --all

lint:
	@$(XTASK) tidy
	@$(CARGO) clippy --workspace --all-targets -- -D warnings

bench:
	@$(CARGO) build --quiet --release --package spore
	@$(CARGO) run --quiet --release --package spore-bench -- cold-wake
	@$(CARGO) run --quiet --release --package spore-bench -- fork-wake
	@$(CARGO) run --quiet --release --package spore-bench -- engine
	@$(CARGO) run --quiet --release --package spore-bench -- memory
	@$(CARGO) bench --package spore-gateway --bench route
	@bench/gateway.sh

rig-test:
	@$(XTASK) rig-test
