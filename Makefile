# Everything from a fresh Debian 12 (root): `make demo` shows a move, `make test` runs all tests.
# Set-up installs Debian packages only when one is missing; a second run only builds what changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

TARGET   := target
STAMPS   := $(TARGET)/.stamps
IMAGE    := $(TARGET)/image
GENERIC  := $(TARGET)/image-generic
MUSL     := x86_64-unknown-linux-musl
RUSTUP   := https://static.rust-lang.org/rustup/dist/x86_64-unknown-linux-gnu/rustup-init
BIN      := $(TARGET)/debug
PROGRAMS := -p dunlin-node -p dunlin-shim

PACKAGES := qemu-system-x86 containerd erofs-utils e2fsprogs lz4 cpio kmod iproute2 busybox-static \
            protobuf-compiler gcc libc6-dev pkg-config ca-certificates curl containernetworking-plugins

# A fresh machine may be busy with updates of its own, and a mirror may have a bad moment.
APT    := -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=5
UPDATE := { for try in 1 2 3; do apt-get $(APT) update --error-on=any && break; sleep 10; done; }
export CARGO_NET_RETRY ?= 10

# rustup's default place, for a shell that has not read its profile yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: build image image-generic demo test lint bench clean packages rust help

help:
	@echo "make demo   move a counting container between two hosts on this machine, and prove it"
	@echo "make test   all tests, the end-to-end ones included"
	@echo "make build | release | image | image-generic | lint | bench | clean"

# --- set-up --------------------------------------------------------------------------------------

packages:
	@missing=(); \
	for package in $(PACKAGES); do \
	    [[ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" == installed ]] || missing+=($$package); \
	done; \
	if (( $${#missing[@]} )); then \
	    (( EUID == 0 )) || { echo "make: these packages are missing: $${missing[*]}; install them, or run make as root" >&2; exit 1; }; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    install="apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0 $(APT)"; \
	    apt-cache show "$${missing[@]}" >/dev/null 2>&1 || $(UPDATE); \
	    $$install "$${missing[@]}" >/dev/null || { $(UPDATE); $$install "$${missing[@]}" >/dev/null; }; \
	fi

rust: packages
	@if ! command -v cargo >/dev/null; then \
	    echo "make: installing Rust with rustup into $$HOME/.cargo (Debian 12's own is too old)"; \
	    at=$$(mktemp -d); trap 'rm -rf "$$at"' EXIT; \
	    curl -sSf --retry 5 --retry-all-errors --connect-timeout 20 -o "$$at/rustup-init" $(RUSTUP) && chmod +x "$$at/rustup-init" && "$$at/rustup-init" -y -q --no-modify-path --profile minimal -c clippy -c rustfmt || \
	    { echo "make: cargo is missing and rustup could not be had from $(RUSTUP); install Rust 1.95 or newer" >&2; exit 1; }; \
	fi
	@if [[ ! -d "$$(rustc --print sysroot)/lib/rustlib/$(MUSL)" ]]; then \
	    command -v rustup >/dev/null && rustup target add $(MUSL) || \
	    { echo "make: the guest agent needs Rust's $(MUSL) target: install rustup and run \`rustup target add $(MUSL)\`" >&2; exit 1; }; \
	fi

# --- programs and the guest's image --------------------------------------------------------------

build: rust
	cargo build $(PROGRAMS)

# What is installed and measured.
release: rust
	cargo build --release $(PROGRAMS)
.PHONY: release

image: rust
	cargo build -p dunlin-guest --target $(MUSL) --profile guest
	@apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || [[ -f $(IMAGE)/.stamp ]] || $(UPDATE)
	image/build.sh $(IMAGE)

# Debian's generic kernel, which has a 9P client: with it containers can use directories of the host.
image-generic: rust
	cargo build -p dunlin-guest --target $(MUSL) --profile guest
	@apt-cache show linux-image-amd64 >/dev/null 2>&1 || [[ -f $(GENERIC)/.stamp ]] || $(UPDATE)
	KERNEL=generic image/build.sh $(GENERIC)

# --- what one runs -------------------------------------------------------------------------------

root:
	@(( EUID == 0 )) || { echo "make: the lab needs root (namespaces, mounts); run \`sudo -E make $(MAKECMDGOALS)\`" >&2; exit 1; }
.PHONY: root

demo: root build image
	@$(BIN)/dunlin demo --image $(IMAGE)

# Newer containerds for the tests; one that cannot be had is skipped, and the tests say so again.
containerds: packages
	@tests/containerd-roots.sh $(TARGET)/containerd
.PHONY: containerds

# Each step runs whatever became of the one before, so that one run tells all. Tests of one program run in turn:
# many start machines or watch the clock, and there may be two processors.
test: export RUST_TEST_THREADS := 1
test: export DUNLIN_E2E := 1
test: export DUNLIN_BIN_DIR := $(CURDIR)/$(BIN)
test: export DUNLIN_IMAGE_DIR := $(CURDIR)/$(IMAGE)
test: export DUNLIN_IMAGE := $(CURDIR)/$(IMAGE)
test: root build image image-generic containerds
	@failed=(); step() { echo "make test: $$1"; shift; "$$@" || failed+=("$$*"); }; \
	step "everything that needs no more than this, and end to end" cargo test --workspace --no-fail-fast; \
	step "the guest's image, booted" cargo test --workspace --test boot -- --ignored; \
	step "containers and pods in a containerd" cargo test --workspace --bin dunlin -- --ignored containerd; \
	step "end to end, with the kernel that has a client for host shares" \
	    env DUNLIN_IMAGE_DIR=$(CURDIR)/$(GENERIC) cargo test --workspace --test e2e -- shares; \
	(( ! $${#failed[@]} )) || { printf 'make test: FAILED: %s\n' "$${failed[@]}" >&2; exit 1; }; \
	echo "make test: everything passed"

lint: rust
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check; else echo "cargo-deny is not installed: licences and advisories were not checked"; fi

bench: root release image
	DUNLIN_BIN_DIR=$(CURDIR)/$(TARGET)/release DUNLIN_IMAGE_DIR=$(CURDIR)/$(IMAGE) cargo bench -p dunlin-benches
	CARGO_PROFILE_BENCH_LTO=fat CARGO_PROFILE_BENCH_CODEGEN_UNITS=1 \
	    cargo test --profile bench -p dunlin-shim --bin containerd-shim-dunlin-v2 -- --ignored --nocapture saving_costs

clean:
	@[[ ! -x $(BIN)/dunlin ]] || (( EUID != 0 )) || $(BIN)/dunlin lab down
	rm -rf $(TARGET)
