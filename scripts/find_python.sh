#!/bin/sh
# Prints the path of a Python that can make the project's environment (3.12 or newer, with venv), or says what to install.
fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}
for name in "$PYTHON" python3.12 python3.13 python3 python python3.14; do
    [ -n "$name" ] && fits "$name" && command -v "$name" && exit 0
done
# Shims of pyenv answer only where a project selects their version; the interpreters behind them always do.
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python "$HOME"/.local/share/uv/python/cpython-3.1[2-9]*/bin/python; do
    fits "$path" && echo "$path" && exit 0
done
echo "eurollm_jax needs Python 3.12 or newer with its venv module, and found none." >&2
echo "Install one (Debian and Ubuntu: apt install python3.12 python3.12-venv; others: pyenv install 3.12, uv python install 3.12)" >&2
echo "or name one: make PYTHON=/path/to/python3.12 $*" >&2
exit 1
