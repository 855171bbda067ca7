# Sourced by the scripts here: makes or reuses .venv and installs this checkout into it with the given extra.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
. .venv/bin/activate
stamp=".venv/.installed-$1"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
  touch "$stamp"
fi
