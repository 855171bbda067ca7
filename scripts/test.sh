#!/usr/bin/env bash
# Installs the test extra and runs the tests; arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
exec python -m pytest "$@"
