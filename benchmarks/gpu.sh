#!/bin/sh
# make gpu: tests and times quantine on the GPU that the PyTorch of PYTHON knows.
#
# All that PYTHON has is used, and only what is missing is installed beside it, in .venv-gpu. Where
# nothing can be installed, the sources run as they are, without the native extension.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ "$("$PYTHON" -c 'print("runs")' 2>/dev/null)" != runs ]; then
	echo "'$PYTHON' does not run as a Python: name one that does by make gpu PYTHON=..." >&2
	exit 1
fi
if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
	exec "$PYTHON" benchmarks/gpu_parts.py
fi
plain() {
	echo "nothing could be installed: the sources are used as they are"
	export PYTHONPATH=src PYTEST_ADDOPTS="-W ignore::RuntimeWarning"
	exec "$1" benchmarks/gpu.py
}
# Neither pip nor ensurepip is asked for, and PYTHON may itself be of a virtual environment, whose
# packages --system-site-packages would not see: a .pth file names its directories instead.
if ! "$PYTHON" -m venv --without-pip .venv-gpu; then
	plain "$PYTHON"
fi
"$PYTHON" -c "
import sys
for path in sys.path:
    if path.endswith(('site-packages', 'dist-packages')):
        print(f'import site; site.addsitedir({path!r})')
" >"$(.venv-gpu/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outside.pth"
if ! "$PYTHON" -m pip --python .venv-gpu/bin/python install -q . pytest hypothesis; then
	plain .venv-gpu/bin/python
fi
exec .venv-gpu/bin/python benchmarks/gpu.py
