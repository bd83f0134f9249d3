#!/usr/bin/env bash
# Installs the Ceph object gateway that the S3 tests prefer (Debian, Ubuntu); says why when it cannot, and soon.
# Exit status: 0 it is there, 1 it cannot be installed here and the tests use moto's server.
set -euo pipefail

programs=(radosgw radosgw-admin ceph-mon ceph-osd ceph ceph-authtool monmaptool)
present() { for program in "${programs[@]}"; do command -v "$program" >/dev/null || return 1; done; }
refuse() { echo "Ceph is not installed: $1; the S3 tests use moto's server" >&2; exit 1; }

present && { echo "Ceph is installed: $(radosgw --version)"; exit 0; }
command -v apt-get >/dev/null || refuse "this system has no apt-get"
as_root=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || refuse "that needs root"
    as_root=(sudo -n)
fi
install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends radosgw ceph-mon ceph-osd)
# Only what comes over the network is limited in time: an installation that has begun is not broken off.
limits=(-o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15)
"${as_root[@]}" timeout 40 apt-get update -qq "${limits[@]}" || echo "the package lists could not be renewed" >&2
"${as_root[@]}" timeout 80 "${install[@]}" "${limits[@]}" --download-only >/dev/null || refuse "its packages cannot be had"
"${as_root[@]}" "${install[@]}" >/dev/null || refuse "the installation failed"
present || refuse "programs are missing after the installation"
echo "Ceph is installed: $(radosgw --version)"
