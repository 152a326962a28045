#!/usr/bin/env bash
# Builds the guest image: a kernel of Debian's, unchanged, and an initramfs with dunlin-guest as /init.
#
#   image/build.sh OUT_DIR [GUEST_BINARY]
#   KERNEL=generic image/build.sh OUT_DIR [GUEST_BINARY]
#
# The cloud kernel is the smaller one and the default. The generic kernel also has a 9P client, which
# host directories in a container need, and drivers for passed-through devices.
#
# OUT_DIR receives vmlinuz, initramfs.cpio.lz4 and image.json (versions and digests). The same
# package and the same binary give the same bytes. The binary defaults to
# target/x86_64-unknown-linux-musl/guest/dunlin-guest (`cargo build -p dunlin-guest
# --target x86_64-unknown-linux-musl --profile guest`).
#
# Environment:
#   DUNLIN_IMAGE_CACHE     where packages and unpacked kernels are kept (default target/image-cache)
#   KERNEL                 `cloud` (default, linux-image-cloud-amd64) or `generic` (linux-image-amd64)
#   DUNLIN_KERNEL_PACKAGE  kernel package to take instead of what that one depends on
#   DUNLIN_EXTRA_MODULES   more modules by name, for example drivers of passed-through devices
#
# Debian packages it needs: apt dpkg kmod cpio lz4 coreutils findutils gawk (or mawk).
# Run as root, apt-get warns that its download was not sandboxed; that is harmless.
set -euo pipefail
export LC_ALL=C TZ=UTC
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
fail() { echo "image/build.sh: $*" >&2; exit 1; }

[ $# -ge 1 ] || fail "usage: image/build.sh OUT_DIR [GUEST_BINARY]"
out=$1
guest=${2:-$root/target/x86_64-unknown-linux-musl/guest/dunlin-guest}
cache=${DUNLIN_IMAGE_CACHE:-$root/target/image-cache}
kernel=${KERNEL:-cloud}
# What the guest has to find built into the kernel, because no module list names it.
built_in=(CONFIG_RD_LZ4 CONFIG_DEVTMPFS CONFIG_TMPFS CONFIG_CGROUPS CONFIG_MEMCG)
case $kernel in
cloud) meta=linux-image-cloud-amd64 lists=("$here/modules.list") built_in+=(CONFIG_EXT4_FS) ;;
generic) meta=linux-image-amd64 lists=("$here/modules-generic.list" "$here/modules.list") ;;
*) fail "KERNEL=$kernel is not known; use cloud or generic" ;;
esac
for tool in apt-cache apt-get dpkg-deb depmod cpio lz4 sha256sum awk; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || fail "$tool is missing; see the package list at the top of this file"
done
PATH=$PATH:/usr/sbin:/sbin
[ -f "$guest" ] || fail "no guest agent at $guest; build it first (see the top of this file)"
if [[ $(readelf -l "$guest" 2>/dev/null || true) == *INTERP* ]]; then
    fail "$guest is dynamically linked and cannot be /init; build it for x86_64-unknown-linux-musl"
fi

mkdir -p "$out" "$cache"
out=$(cd "$out" && pwd)
cache=$(cd "$cache" && pwd)

# --- the kernel package ------------------------------------------------------------------------
package=${DUNLIN_KERNEL_PACKAGE:-}
if [ -z "$package" ]; then
    package=$(apt-cache depends "$meta" 2>/dev/null |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ && !found++ { print $2 }') || true
    [ -n "$package" ] || fail "apt knows no $meta; run apt-get update, or set DUNLIN_KERNEL_PACKAGE"
fi
version=$(apt-cache show --no-all-versions "$package" 2>/dev/null | awk '$1 == "Version:" && !found++ { print $2 }') || true
[ -n "$version" ] || fail "apt knows no version of $package; run apt-get update"
release=${package#linux-image-}
deb=$cache/${package}_${version/:/%3a}_amd64.deb

stamp_of() {
    { echo "$package $version ${DUNLIN_EXTRA_MODULES:-}"; sha256sum <"$guest"; cat "$here/build.sh" "${lists[@]}"; } | sha256sum | cut -d' ' -f1
}
stamp=$(stamp_of)
if [ -f "$out/.stamp" ] && [ "$(cat "$out/.stamp")" = "$stamp" ] &&
    [ -f "$out/vmlinuz" ] && [ -f "$out/initramfs.cpio.lz4" ] && [ -f "$out/image.json" ]; then
    echo "image in $out is up to date"
    exit 0
fi

if [ ! -f "$deb" ]; then
    if ! (cd "$cache" && apt-get -o Acquire::Retries=5 download "$package=$version" >&2); then
        # Debian drops the kernels of yesterday: what apt's lists name may be gone.
        [ -z "${DUNLIN_LISTS_ARE_FRESH:-}" ] || fail "cannot download $package $version"
        apt-get update -qq >&2 || fail "cannot download $package $version, nor update apt's lists"
        DUNLIN_LISTS_ARE_FRESH=1 exec bash "$here/build.sh" "$out" "$guest"
    fi
    [ -f "$deb" ] || fail "apt-get download left no $deb"
fi
tree=$cache/${package}_${version/:/%3a}
if [ ! -f "$tree/.ready" ]; then
    rm -rf "$tree"
    mkdir -p "$tree"
    dpkg-deb -x "$deb" "$tree"
    depmod -b "$tree" "$release"
    touch "$tree/.ready"
fi
modules=$tree/lib/modules/$release
config=$tree/boot/config-$release
for option in "${built_in[@]}"; do
    grep -q "^$option=y" "$config" || fail "kernel $release lacks $option=y, which the guest needs built in"
done

# --- the initramfs -----------------------------------------------------------------------------
work=$(mktemp -d "${TMPDIR:-/tmp}/dunlin-image.XXXXXX")
trap 'rm -rf "$work"' EXIT
fs=$work/fs
mkdir -p "$fs/lib/dunlin" "$fs/dev" "$fs/proc" "$fs/sys" "$fs/run" "$fs/newroot"
install -m 0755 "$guest" "$fs/init"

# modules.dep lists, after the colon, all that a module needs, the last to be loaded first.
# Loading each module's list backwards, each file once, is a load order.
{ cat "${lists[@]}"; printf '%s\n' ${DUNLIN_EXTRA_MODULES:-}; } >"$work/wanted"
awk '
    FNR == NR { sub(/#.*/, ""); if (NF) wanted[++n] = $1; next }
    {
        file = $1; sub(/:$/, "", file)
        name = file; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name)
        path[name] = file
        deps[name] = ""
        for (i = NF; i > 1; i--) deps[name] = deps[name] " " $i
    }
    END {
        for (i = 1; i <= n; i++) {
            name = wanted[i]; gsub(/-/, "_", name)
            if (!(name in path)) { missing = missing " " wanted[i]; continue }
            count = split(deps[name] " " path[name], files, " ")
            for (k = 1; k <= count; k++) if (!(files[k] in seen)) { seen[files[k]] = 1; print files[k] }
        }
        if (missing != "") { print "missing:" missing > "/dev/stderr"; exit 1 }
    }
' "$work/wanted" "$modules/modules.dep" >"$work/load-order" || {
    # A kernel that has one of them built in is as good; one that has it nowhere is not.
    fail "kernel $release does not have all of image/modules*.list and DUNLIN_EXTRA_MODULES as modules; built-in ones must leave the list"
}
while read -r file; do
    install -m 0644 "$modules/$file" "$fs/lib/dunlin/$(basename "$file")"
    basename "$file" >>"$fs/lib/dunlin/modules.order"
done <"$work/load-order"

find "$fs" -print0 | xargs -0 touch -h -d @0
(cd "$fs" && find . -mindepth 1 -print0 | sort -z |
    cpio --null --create --format=newc --reproducible --owner=0:0 --quiet) >"$work/initramfs.cpio"
# The kernel reads LZ4's legacy frame only.
lz4 -l -9 -f -q "$work/initramfs.cpio" "$work/initramfs.cpio.lz4"
# Every machine loads it into its memory at boot.
size=$(stat -c %s "$work/initramfs.cpio.lz4")
[ "$size" -le $((20 << 20)) ] || fail "the initramfs has $size bytes, more than 20 MiB; take modules out"

install -m 0644 "$tree/boot/vmlinuz-$release" "$out/vmlinuz"
install -m 0644 "$work/initramfs.cpio.lz4" "$out/initramfs.cpio.lz4"
digest() { echo "sha256:$(sha256sum <"$1" | cut -d' ' -f1)"; }
cat >"$out/image.json" <<JSON
{
  "kernel_package": "$package",
  "kernel_package_version": "$version",
  "kernel_version": "$release",
  "kernel_digest": "$(digest "$out/vmlinuz")",
  "initramfs_digest": "$(digest "$out/initramfs.cpio.lz4")",
  "guest_digest": "$(digest "$guest")",
  "modules": [$(sed 's/.*/"&"/' "$fs/lib/dunlin/modules.order" | paste -sd,)]
}
JSON
echo "$stamp" >"$out/.stamp"
echo "vmlinuz $(stat -c %s "$out/vmlinuz") bytes, initramfs $(stat -c %s "$out/initramfs.cpio.lz4") bytes (compressed), kernel $release"
