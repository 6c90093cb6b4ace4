# make demo: trains a small RWKV-6 on the King James Bible (some 100 seconds) and lets it write.
# make article: runs examples/article, tables to the screen and pictures to runs/article.
# make test: runs every test; make test-gpu: those of the operator on a GPU.
# make report-gpu: writes all that can be found out about a GPU into build/gpu-report.md.
# make docs: renders README.md and docs/ as a site, into build/site.
# All create .venv and build the kernels first.
MAKEFLAGS += -j2 # installing and compiling, side by side
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.inc %.cu %.cuh,$(CSRC)) $(wildcard tests/kernel_library/*) \
	$(wildcard tests/cuda/*.cpp tests/ptxcpu/*.cpp tests/ptxcpu/src/*.cpp tests/ptxcpu/src/*.h) \
	$(wildcard tests/ptxcpu/kernels/*.cu) benchmarks/limits.cpp
# worksteal: the longest tests come first and all of a file would go to one process otherwise
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal -q
export RWKV6_XLA := $(abspath .venv/oldest-jaxlib/jaxlib/include)
# Enough to develop with: machine code for one generation of GPUs, and PTX, which later ones compile
# for themselves at the first call. A wheel gets all architectures, and `make wheel` looks at the
# machine code of each. The tests run the PTX in an interpreter, which reads it as text.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
export NVCC_APPEND_FLAGS ?= --no-compress
# Of nvcc and of the C++ compiler beside it, each.
export MAX_JOBS ?= $(shell nproc)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Images of Docker often set this. Python would then compile all of torch and TensorFlow again in every
# process that a test starts: most of the time that an import takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: article demo test test-gpu report-gpu lint format bench bench-gpu bench-rivals \
	bench-readme sanitize test-neon test-clang wheel clean

demo: export PYTHONPATH := .
demo: .venv/demo-built
	$(BIN)/python examples/train_lm.py --steps 1600 --out runs/demo
	$(BIN)/python examples/generate.py runs/demo/model.pth --prompt "In the beginning" --length 600

article: .venv/built
	for station in rnn attention aft compare_mixers; do \
		$(BIN)/python examples/article/$$station.py || exit; done
	$(BIN)/python examples/article/rwkv4_numpy.py runs/article/rwkv4.pth
	$(BIN)/python examples/article/rwkv4_to_6.py --checkpoint runs/article/rwkv6.pth --layer 1

test: .venv/built
	$(PYTEST)

# For those who have an NVIDIA GPU: the operator's tests on it, and how fast it is there.
test-gpu: export RWKV6_CUDA := 1
test-gpu: .venv/built
	$(BIN)/python -m pytest -q --device cuda

bench-gpu: export RWKV6_CUDA := 1
bench-gpu: .venv/built
	$(BIN)/python -m benchmarks gpu

# One file about a GPU, with everything that makes sense to ask it: send it to us.
report-gpu: export RWKV6_CUDA := 1
report-gpu: .venv/built
	$(BIN)/python -m benchmarks report-gpu

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: docs
docs: .venv/built
	$(BIN)/python -m sphinx -E -q -W --keep-going -c docs -d build/doctrees . build/site
	cp build/site/README.html build/site/index.html

bench: .venv/built
	$(BIN)/python -m benchmarks all --short

# What to race against from PyPI (JAX, rwkv-ops, ggml: 0.9 GB); bench names what is not there.
bench-rivals: .venv/installed
	$(BIN)/python -m benchmarks rivals

# The README's figures of this CPU's instruction set, anew: 25 minutes of an otherwise idle machine,
# and those of `train`, which takes much longer where bfloat16 has no instructions.
bench-readme: .venv/built bench-rivals
	$(BIN)/python -m benchmarks all --out 'docs/benchmarks/{isa}'
	$(BIN)/python -m benchmarks train --out 'docs/benchmarks/{isa}'
	$(BIN)/python -m benchmarks readme

# The kernels and the binding under AddressSanitizer and UBSan, run by the tests that reach them.
SANITIZED_TESTS := tests/test_forward.py tests/test_backward.py tests/test_update.py \
	tests/test_errors.py tests/test_fuzz.py tests/test_kernel_library.py tests/test_wkv4.py
sanitize: .venv/installed
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r torch_rwkv6 keras_adapter tests csrc setup.py pyproject.toml README.md LICENSE build/sanitize
	cd build/sanitize && RWKV6_SANITIZE=address,undefined RWKV6_CUDA=0 \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --capture=sys -m "not memory" \
		$(SANITIZED_TESTS)

# The kernel library and its tests in C++ (tests/kernel_library), built by another compiler: for
# AArch64, run in an emulator, and by Clang. Not part of CI; on Debian they need
#   apt-get install g++-aarch64-linux-gnu qemu-user-static
#   apt-get install clang
KERNEL_LIBRARY_TEST = $(wildcard csrc/*.cpp csrc/cpu/*.cpp tests/kernel_library/*.cpp) \
	csrc/cuda/absent.cpp
KERNEL_FLAGS = -std=c++20 -O3 -ffp-contract=off -Wall -Wextra -Werror -Icsrc -Icsrc/include \
	-isystem $(wildcard .venv/lib/python*/site-packages/torch/include)

test-neon: build/test-neon
	RWKV6_CPU_ISA=neon qemu-aarch64-static $<

test-clang: build/test-clang
	for isa in baseline avx2 avx512; do \
		RWKV6_CPU_ISA=$$isa $< || [ $$? = 2 ] || exit 1; done  # 2: the CPU lacks it

build/test-neon: CXX := aarch64-linux-gnu-g++
build/test-neon: LDFLAGS := -static
build/test-clang: CXX := clang++
build/test-neon build/test-clang: .venv/installed $(CSRC) $(wildcard tests/kernel_library/*)
	rm -rf $@.objects && mkdir -p $@.objects
	printf '%s\n' $(KERNEL_LIBRARY_TEST) | xargs -P "$$(nproc)" -I{} sh -c \
		'$(CXX) $(KERNEL_FLAGS) -c {} -o $@.objects/$$(basename {}).o'
	$(CXX) $(LDFLAGS) $@.objects/*.o -o $@

# One wheel, for every Python and torch that we support, and for glibc 2.28 as torch itself.
wheel: export TORCH_CUDA_ARCH_LIST :=
wheel: export NVCC_APPEND_FLAGS :=
wheel: export RWKV6_CUDA := 1
wheel: export RWKV6_GLIBC := 2.28
wheel: .venv/installed requirements-wheel.txt
	$(PIP_INSTALL) -r requirements-wheel.txt
	rm -rf build/wheel build/lib.* dist/*.whl  # so that all is linked anew, and nothing stale packed
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) audit-wheel WHEEL="$$(echo build/wheel/*.whl)" OUT=dist
	PYTHONPATH=$(abspath build/audit) $(MAKE) test-installed PYTHON=$(abspath $(BIN))/python \
		INSTALLED_TESTS=cuda_machine_code

# Checks a wheel, and says in its name which systems it is for: also run by cibuildwheel, in its
# container. torch brings its own libraries, and every system has those of the C++ compiler.
.PHONY: audit-wheel test-wheel test-installed
audit-wheel:
	auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --exclude 'libtorch*.so' \
		--exclude libc10.so -w $(OUT) $(WHEEL)
	abi3audit --strict --summary $(OUT)/*.whl
	rm -rf build/audit && python -m zipfile -e $(OUT)/*.whl build/audit
	torch-abi-audit --check both build/audit/torch_rwkv6/_C.abi3.so

# The tests of the wheel in dist, in an environment that has only what it says it needs.
test-wheel:
	rm -rf build/wheel-env && $(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install -q --no-compile dist/*.whl -c requirements-demo.txt \
		pytest
	$(MAKE) test-installed PYTHON=$(abspath build/wheel-env/bin/python)

# The tests of the operator for the torch_rwkv6 that PYTHON has: from an empty directory, so that it
# cannot be the checkout's.
INSTALLED_TESTS := forward update wkv4 errors nonfinite opcheck
test-installed:
	rm -rf build/empty && mkdir -p build/empty
	cd build/empty && $(PYTHON) -m pytest -q -p no:cacheprovider \
		$(foreach name,$(INSTALLED_TESTS),$(CURDIR)/tests/test_$(name).py)

# The oldest and the newest torch, JAX, Keras and transformers, each in an environment of its own, one
# after the other: gigabytes to download. ONLY="torch-2.10 jax-oldest" runs some (tests/versions.py).
.PHONY: test-versions
test-versions: .venv/built
	rm -rf build/versions/wheel build/lib.*
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/versions/wheel .
	$(BIN)/python tests/versions.py build/versions/wheel/*.whl $(ONLY)

# The oldest jaxlib that we support: a binding built with its headers runs with it and all later ones.
OLDEST_JAXLIB := 0.5.3
HEADERS_ALONE := import glob, zipfile; wheel = zipfile.ZipFile(*glob.glob("build/jaxlib/*.whl")); \
	wheel.extractall(".venv/oldest-jaxlib", [n for n in wheel.namelist() if "/include/" in n])

# These stages share .venv and build/objects. Those of the demo come first: beside them, what the
# tests need besides is downloaded and unpacked.
# --no-compile: most of some thousand Python files are never imported.
PIP_INSTALL = $(BIN)/python -m pip install -q --no-compile
.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo-installed: .venv/created requirements-demo.txt
	$(PIP_INSTALL) --no-warn-conflicts -r requirements-demo.txt
	touch $@

# The largest of the other packages come beside the demo's: alone, since what they depend on may be
# the demo's too. With everything else, pip then sees to that.
LARGEST := tensorflow|transformers|onnx|mypy|ruff|clang-format
.venv/largest-installed: .venv/created requirements-dev.txt
	@mkdir -p build && grep -E '^($(LARGEST))' requirements-dev.txt > build/largest.txt
	$(PIP_INSTALL) --no-deps -r build/largest.txt
	touch $@

.venv/demo-built: .venv/demo-installed setup.py $(CSRC)
	@mkdir -p build && echo "compiling the kernels for this CPU (build/demo.log)"
	@RWKV6_CUDA=0 RWKV6_XLA=0 RWKV6_BUILD_ISA=native $(BIN)/python setup.py -q build_ext --inplace \
		> build/demo.log 2>&1 || { cat build/demo.log; exit 1; }
	@touch $@

.venv/installed: .venv/demo-installed .venv/largest-installed .venv/xla-headers requirements-dev.txt
	$(PIP_INSTALL) -r requirements-dev.txt
	touch $@

.venv/xla-headers: .venv/created
	$(BIN)/python -m pip download -q --no-deps -d build/jaxlib jaxlib==$(OLDEST_JAXLIB)
	$(BIN)/python -c '$(HEADERS_ALONE)'
	rm -r build/jaxlib
	touch $@

.venv/built: .venv/installed .venv/demo-built pyproject.toml
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info torch_rwkv6/*.so keras_adapter/*.so
