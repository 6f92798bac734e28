#!/bin/sh
# Imports each wheel in DIR, unpacked beside what quantine needs, with the Python of its processor.
#
#   sh wheels/check.sh DIR
set -eu
for wheel in "$1"/quantine-*.whl; do
  case $wheel in
    *aarch64.whl) python=.venv-arm/python ;;
    *) python=.venv/bin/python ;;
  esac
  site=build/wheels/$(basename "$wheel" .whl)
  rm -rf "$site"
  .venv-arm/build/bin/python -m zipfile -e "$wheel" "$site"
  echo "== $wheel"
  QUANTINE_ARM=$site PYTHONPATH=$site "$python" -c '
import sys
import quantine
from quantine import _native
from quantine.cli import main
assert quantine.__file__.startswith(sys.argv[1]), quantine.__file__
print("instruction sets:", *_native.levels())
main(["--version"])' "$PWD/$site"
done
