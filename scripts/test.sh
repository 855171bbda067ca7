#!/usr/bin/env bash
# Installs the test extra and runs the tests, a file at a time in each of up to four processes; arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
OMP_NUM_THREADS=1 exec python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
