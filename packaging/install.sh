#!/usr/bin/env bash
# Installs what `make release image` made below a prefix: packaging/install.sh [DESTDIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dest=${1:-}
bin=${DUNLIN_BIN_DIR:-target/release}
image=${DUNLIN_IMAGE_DIR:-target/image}
for file in "$bin/dunlin" "$bin/containerd-shim-dunlin-v2" "$image/vmlinuz" "$image/initramfs.cpio.lz4"; do
    [[ -f $file ]] || { echo "packaging/install.sh: $file is missing; run make release image" >&2; exit 1; }
done
install -D -m 0755 -t "$dest/usr/bin" "$bin/dunlin" "$bin/containerd-shim-dunlin-v2"
install -D -m 0644 -t "$dest/usr/lib/dunlin" "$image/vmlinuz" "$image/initramfs.cpio.lz4" "$image/image.json"
install -D -m 0644 -t "$dest/lib/systemd/system" packaging/dunlin-node.service
for file in config.toml node.toml; do
    # What an administrator wrote stays.
    [[ -e $dest/etc/dunlin/$file ]] || install -D -m 0644 "packaging/$file" "$dest/etc/dunlin/$file"
done
