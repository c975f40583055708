#!/usr/bin/env bash
# Install timm-alignmix from this clone into its own environment, .venv, with all that its programs need.
#
#   bash install.sh         to train and to evaluate
#   bash install.sh test    the same, and to run the tests
#
# Run again at will: what is there already is left alone. PYTHON=python3.12 bash install.sh picks another Python.
# System packages are installed only on Debian and Ubuntu, only where something is missing, with sudo only where not root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

mode=${1:-train}
python=${PYTHON:-python3}
venv=.venv

say() { printf 'install.sh: %s\n' "$*"; }
fail() { printf '\ninstall.sh: ERROR: %s\n' "$*" >&2; exit 1; }

case $mode in
    train) extras=train,evaluate,detection; covers=(train) ;;
    test) extras=train,test,dev; covers=(train test) ;;
    *) fail "unknown argument '$mode': use 'bash install.sh' or 'bash install.sh test'." ;;
esac

# What this script would do depends on these files alone, so their checksum says whether it was done.
state=$(cat setup.py install.sh | cksum)
if [[ -x $venv/bin/python && $(cat "$venv/installed-$mode" 2>/dev/null) == "$state" ]]; then
    say "$venv is up to date."
    exit 0
fi

# Print the Debian packages that are missing for the environment itself, or for building FFCV.
missing_for_venv() {
    if ! command -v "$python" >/dev/null; then
        echo python3 python3-venv
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo python3-venv
    fi
}
missing_for_ffcv() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null \
        || echo python3-dev
}
apt_install() {
    local sudo=()
    if ! command -v apt-get >/dev/null; then
        say "this is no Debian or Ubuntu: please install these, or their like, yourself: $*"
        return 1
    fi
    if [[ $(id -u) != 0 ]]; then
        if ! command -v sudo >/dev/null; then
            say "neither root nor sudo here: please have these system packages installed: $*"
            return 1
        fi
        sudo=(sudo)
    fi
    say "installing system packages: $*"
    "${sudo[@]}" apt-get update -qq || say "apt-get update failed, trying with the package lists at hand."
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

packages=$(missing_for_venv)
if [[ -n $packages ]]; then
    # shellcheck disable=SC2086  # one word a package
    apt_install $packages || true
    [[ -z $(missing_for_venv) ]] || fail "$python cannot make a virtual environment; these system packages are needed: "$packages
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || fail "Python 3.10 or newer is needed, $python is $("$python" -V 2>&1). Try PYTHON=python3.12 bash install.sh"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $venv with $("$python" -V)."
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python -m venv failed, see above."
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

say "installing timm-alignmix and its Python packages; PyTorch's are some gigabytes the first time."
"${pip[@]}" install -e ".[$extras]" \
    || fail "pip failed, see above. Usual reasons: no network, a proxy that pip does not know, or a full disk."

install_ffcv() {
    local packages
    say "FFCV reads .beton files, which keeps GPUs busy on ImageNet. It costs a compiler, OpenCV and libjpeg-turbo."
    packages=$(missing_for_ffcv | tr '\n' ' ')
    if [[ -n $packages ]]; then
        # shellcheck disable=SC2086
        apt_install $packages || return 1
    fi
    say "building FFCV, a minute or two."
    "${pip[@]}" install -e ".[$extras,ffcv]" && "$venv/bin/python" -c 'import ffcv'
}
if "$venv/bin/python" -c 'import ffcv' 2>/dev/null || install_ffcv; then
    for name in "${covers[@]}"; do
        echo "$state" > "$venv/installed-$name"
    done
    say "done, with FFCV."
else
    cat >&2 <<'MESSAGE'

install.sh: ############################################################################
install.sh: WARNING: FFCV could not be installed, the reason is above.
install.sh: All else works: training reads folders of images with timm's loader, which is slower.
install.sh: Run install.sh again once the reason is gone.
install.sh: ############################################################################
MESSAGE
fi
