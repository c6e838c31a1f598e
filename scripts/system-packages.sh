#!/bin/sh
# Installs the Debian packages that make the isolation stronger and the tests complete; without root says what is skipped.
missing=""
for package in "$@"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; } && exit 0
    echo "could not install:$missing; going on without" >&2
else
    echo "no root, so not installed:$missing; what needs them is weaker (see: cipherfleet vcm show) or left out, and tests of it are skipped" >&2
fi
