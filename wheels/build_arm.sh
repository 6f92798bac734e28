#!/bin/sh
# Builds quantine's wheel for ARM processors of 64 bits into the directory DIR, on an x86-64 machine
# with an environment that arm_environment.sh made: the compiler is the machine's own, and Python is
# told the names and options of the one for ARM.
#
#   sh wheels/build_arm.sh DIR
set -eu
environment=$PWD/.venv-arm
settings=$(ls "$environment"/root/usr/lib/python3.*/_sysconfigdata__aarch64-linux-gnu.py)
mkdir -p "$environment/settings"
cp "$settings" "$environment/settings"
_PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=$(basename "$settings" .py) \
  PYTHONPATH=$environment/settings CMAKE_TOOLCHAIN_FILE=$PWD/wheels/aarch64.cmake \
  "$environment/build/bin/python" -m pip wheel -q --no-build-isolation --no-deps -w "$1" \
  --config-settings build-dir=build/aarch64 \
  --config-settings "cmake.define.Python_INCLUDE_DIR=$environment/headers" .
