#!/bin/sh
# Prints the path of a Python that is new enough: scripts/find_python.sh [python3.13]
# With a name, that one is meant; without, the first of the usual names that is at least 3.11.

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

for name in ${1:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    # pyenv keeps versions that are installed but not selected out of the PATH.
    for candidate in "$name" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name"; do
        if "$candidate" -c "$new_enough" 2>/dev/null; then
            exec "$candidate" -c 'import sys; print(sys.executable)'
        fi
    done
done
echo "no Python 3.11 or newer found (looked for ${1:-python3, python3.11 to python3.14}); \
install one, or give its path: make PYTHON=/path/to/python" >&2
exit 1
