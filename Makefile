# make demo: trains a small RWKV-6 on the King James Bible (about two minutes) and lets it write.
# make test: runs every test. Both create .venv and build the kernels first.
PYTHON ?= python3
BIN := .venv/bin
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cpp %.inc,$(CSRC))
PYTEST := $(BIN)/python -m pytest -n auto -q

.PHONY: demo test lint format bench sanitize wheel clean

demo: .venv/built
	$(BIN)/python examples/train_lm.py --out runs/demo
	$(BIN)/python examples/generate.py runs/demo/model.pth --prompt "In the beginning" --length 600

test: .venv/built
	$(PYTEST)

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/built
	$(BIN)/python -m benchmarks overhead
	$(BIN)/python -m benchmarks op
	$(BIN)/python -m benchmarks model

# The kernels and the binding under AddressSanitizer and UBSan, run by the tests that reach them.
SANITIZED_TESTS := tests/test_forward.py tests/test_backward.py tests/test_inplace.py \
	tests/test_errors.py tests/test_fuzz.py tests/test_kernel_library.py tests/test_wkv4.py
sanitize: .venv/installed
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r torch_rwkv6 tests csrc setup.py pyproject.toml README.md LICENSE build/sanitize
	cd build/sanitize && RWKV6_SANITIZE=address,undefined $(abspath $(BIN))/python setup.py \
		-q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --capture=sys -m "not memory" \
		$(SANITIZED_TESTS)

wheel: .venv/installed
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

.venv/installed: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

.venv/built: .venv/installed setup.py pyproject.toml $(CSRC)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info torch_rwkv6/*.so
