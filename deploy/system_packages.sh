#!/usr/bin/env bash
# Installs the few system libraries that Python packages cannot bring, where this user may; else says the exact command.
# Usage: system_packages.sh demo|test
set -euo pipefail

missing=()
have_library() { ldconfig -p 2>/dev/null | grep -qF "$1" || /sbin/ldconfig -p | grep -qF "$1"; }
have_library libEGL.so.1 || missing+=(libegl1)            # MuJoCo renders without a screen through EGL.
have_library libGL.so.1 || missing+=(libgl1)              # OpenCV and MuJoCo.
have_library libgthread-2.0.so.0 || missing+=(libglib2.0-0) # OpenCV.
if [ "${1:-demo}" = test ]; then
  command -v chromium >/dev/null || command -v chromium-browser >/dev/null || missing+=(chromium) # Browser tests.
fi
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "These system packages are missing (Debian's names): ${missing[*]}. Install them with your package manager, then run this again." >&2
  exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
  prefix=""
elif sudo -n true 2>/dev/null; then
  prefix="sudo"
else
  echo "These system packages are missing: ${missing[*]}. Run this, then try again:" >&2
  echo "  sudo apt-get update && sudo $install" >&2
  exit 1
fi
echo "Installing system packages: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
$prefix apt-get update -qq
$prefix $install -qq >/dev/null
