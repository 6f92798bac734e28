#!/bin/sh
# make gpu: tests and times quantine on the GPU that the PyTorch of PYTHON knows.
#
# That PyTorch is used, and only what is missing is installed beside it, in .venv-gpu. Where nothing
# can be installed, the sources run as they are, without the native extension.
set -eu
cd "$(dirname "$0")/.."
if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
	echo "$PYTHON has no PyTorch that knows a GPU. With one, this would run the tests of the programs"
	echo "on it, time products, attention and tokens, quantize, compare with the CPU, and write"
	echo "benchmarks/results/gpu-NAME.json: benchmarks/gpu.py has the parts."
	exit 0
fi
"$PYTHON" -m venv --system-site-packages .venv-gpu
if .venv-gpu/bin/python -m pip install -q . pytest hypothesis scikit-learn; then
	exec .venv-gpu/bin/python benchmarks/gpu.py
fi
echo "nothing could be installed: the sources are used as they are"
export PYTHONPATH=src PYTEST_ADDOPTS="-W ignore::RuntimeWarning"
exec .venv-gpu/bin/python benchmarks/gpu.py
