#!/usr/bin/env bash
# Brings the containerd of newer Debian suites below a directory, beside the one that is installed:
#
#   tests/containerd-roots.sh OUT_DIR
#
#   OUT_DIR/1.7/   containerd 1.7 of trixie, unpacked
#   OUT_DIR/2.x/   containerd 2 of sid, unpacked
#   OUT_DIR/2.x.skipped   why it could not be had this time
#
# Nothing is installed: the packages are unpacked, and their programs run on bookworm's own libc. apt works
# with lists, state and cache of its own, on the mirror that this machine uses for its own suite, and checks
# Debian's signatures. What is there stays as it is: delete OUT_DIR/2.x to have sid's newest.
#
# A suite that cannot be had is said loudly and is no failure.
set -euo pipefail
export LC_ALL=C
umask 022

fail() { echo "tests/containerd-roots.sh: $*" >&2; exit 1; }
[ $# -eq 1 ] || fail "usage: tests/containerd-roots.sh OUT_DIR"
for tool in apt-get apt-cache dpkg-deb; do
    command -v "$tool" >/dev/null || fail "$tool is missing; this needs a Debian system"
done
mkdir -p "$1"
out=$(cd "$1" && pwd)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# Where the machine's own suite comes from.
mirror() {
    local codename found
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    found=$(apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        awk -v suite="$codename" '$2 == suite && $3 == "main" && !found++ { print $1 }') || true
    echo "${found:-http://deb.debian.org/debian}"
}

# apt WORK_DIR PROGRAM ARGUMENTS..
apt() {
    local work=$1 program=$2
    shift 2
    timeout 300 "$program" \
        -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts="$work/preferences" \
        -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User=root -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Dpkg::Use-Pty=0 "$@"
}

# bring NAME SUITE VERSION_PREFIX: unpacks one suite's containerd, or says on standard output why not.
bring() {
    local name=$1 suite=$2 wanted=$3 root=$out/$1 work=$out/.work-$1 version said deb
    rm -rf "$work" "$root.new"
    mkdir -p "$work"/{sources,preferences,state/lists/partial,cache/archives/partial}
    : >"$work/status"
    [ -f "$keyring" ] || { echo "$keyring is missing (package debian-archive-keyring)"; return 1; }
    cat >"$work/sources/$suite.sources" <<SOURCES
Types: deb
URIs: $(mirror)
Suites: $suite
Components: main
Signed-By: $keyring
SOURCES
    said=$(apt "$work" apt-get -qq --error-on=any update 2>&1) ||
        { echo "apt-get update for $suite failed: $(tail -n 1 <<<"$said")"; return 1; }
    version=$(apt "$work" apt-cache show --no-all-versions containerd 2>/dev/null | awk '$1 == "Version:" && !found++ { print $2 }') || true
    case $version in
    "$wanted"*) ;;
    "") echo "$suite has no package containerd"; return 1 ;;
    *) echo "$suite has containerd $version by now, not $wanted"; return 1 ;;
    esac
    said=$(cd "$work" && apt "$work" apt-get -qq download "containerd=$version" 2>&1) ||
        { echo "containerd $version could not be downloaded: $(tail -n 1 <<<"$said")"; return 1; }
    deb=$(find "$work" -maxdepth 1 -name 'containerd_*.deb' -print -quit)
    [ -n "$deb" ] || { echo "apt-get download left no package"; return 1; }
    dpkg-deb -x "$deb" "$root.new" || { echo "$deb cannot be unpacked"; return 1; }
    for program in containerd ctr; do
        said=$("$root.new/usr/bin/$program" --version 2>&1) ||
            { echo "$program $version does not run here: $(tail -n 1 <<<"$said")"; return 1; }
    done
    echo "$version" >"$root.new/version"
    rm -rf "$root"
    mv "$root.new" "$root"
    rm -rf "$work"
}

while read -r name suite wanted; do
    if [ -f "$out/$name/version" ]; then
        continue
    fi
    echo "containerd $name: taking it from Debian $suite"
    if reason=$(bring "$name" "$suite" "$wanted"); then
        rm -f "$out/$name.skipped"
        echo "containerd $name: $(cat "$out/$name/version") in $out/$name"
    else
        rm -rf "$out/$name.new" "$out/.work-$name"
        echo "$reason" >"$out/$name.skipped"
        echo "!!! containerd $name is SKIPPED: $reason" >&2
    fi
done <<'SUITES'
1.7 trixie 1.7
2.x sid 2.
SUITES
