# Makes the virtual environment; sourced by tools/up and tools/test, which set `what` to the extra
# to install ("" or "dev"). Needs Python >= 3.11 and nothing else. Sets `root` and `venv`.
#
#   COTUNE_VENV   where the environment is (default: .venv in the checkout)
#   PYTHON        which Python makes it (default: the first of python3.11 ... that works)

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${COTUNE_VENV:-$root/.venv}

say() { printf 'cotune: %s\n' "$*"; }

fail() {
    printf 'cotune: %s\n' "$*" >&2
    exit 1
}

# step TITLE COMMAND...: run it, and say what is done and how long it took.
step() {
    local title=$1 began=$SECONDS
    shift
    say "$title ..."
    "$@" || fail "$title failed (the lines above say why)"
    say "$title: $((SECONDS - began)) s"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        if [ "$candidate" = "${PYTHON:-}" ]; then
            fail "PYTHON is $candidate, which is not Python 3.11 or newer"
        fi
    done
    fail "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.12 $0"
}

make_venv() {
    local python
    python=$(find_python) || exit 1
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "$python cannot make virtual environments; install its venv module" \
        "(Debian and Ubuntu: apt install python3-venv)"
    say "using $python ($("$python" -V))"
    "$python" -m venv "$venv"
}

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
        --constraint "$root/constraints.txt" "$@"
}

set_up() {
    # A stamp holds the checksum of what was installed from; that of "dev" covers the plain one.
    local stamp="$venv/.cotune-set-up${what:+-$what}" wanted torch known
    wanted=$(cd "$root" && cat pyproject.toml constraints.txt | cksum)
    for known in "$stamp" "$venv/.cotune-set-up-dev"; do
        if [ -x "$venv/bin/python" ] && [ "$(cat "$known" 2>/dev/null)" = "$wanted" ]; then
            say "environment $venv is up to date"
            return
        fi
    done
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        step "making the environment $venv" make_venv
    fi
    # torch first, alone and by its exact version: then a build without CUDA that pip has been
    # pointed to satisfies it. Any looser requirement may resolve to another version instead, and
    # to gigabytes of CUDA packages that a machine without a GPU has no use for.
    torch=$(grep '^torch==' "$root/constraints.txt")
    step "installing $torch (the first time this downloads a lot)" pip_install "$torch"
    step "installing cotune${what:+[$what]}" pip_install --editable "$root${what:+[$what]}"
    printf '%s\n' "$wanted" >"$stamp"
    say "set-up: $SECONDS s in all"
}

set_up
