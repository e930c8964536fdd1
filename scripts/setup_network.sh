#!/usr/bin/env bash
# Installs what scripts/bench/emulate_cluster.py needs besides Python, where it is missing (Debian, Ubuntu; as root).
set -euo pipefail
packages=()
command -v ip > /dev/null && command -v tc > /dev/null || packages+=(iproute2)
command -v nsenter > /dev/null && command -v unshare > /dev/null && command -v setpriv > /dev/null || packages+=(util-linux)
if [ ${#packages[@]} -gt 0 ]; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
