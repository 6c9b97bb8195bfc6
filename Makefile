# One entry for people and for CI: every workflow step is one of these targets. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTEST_ARGS ?=
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Git hands hooks its own location in these; a test that makes a repository of its own must not see it.
unexport GIT_DIR GIT_INDEX_FILE GIT_WORK_TREE
# Where this is set, every process compiles all that it imports: 8 s for torch alone, 40 s with transformers.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env gpu system extras lock repro smoke banking77 banking77-data bench cache-pull cache-push report-pr rollout-order test quick lint check format sync readme hooks lab docs dist clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- environment ------------------------------------------------------------------------------------------------

env: $(VENV)/.installed ## the environment, with the versions of requirements.lock exactly (done once)

$(VENV)/.installed: requirements.lock pyproject.toml tools/install.sh
	tools/install.sh $(VENV)
	touch $@

gpu: env ## ONNX Runtime's CUDA builds in place of the CPU's, for a machine with a GPU (requirements-gpu.txt)
	$(VENV)/bin/python -m pip uninstall -q -y onnxruntime onnxruntime-genai onnxruntime-gpu onnxruntime-genai-cuda
	$(VENV)/bin/python -m pip install -q -r requirements-gpu.txt

system: ## packages of Debian or Ubuntu that tests use beside Python's: podman, redis, prometheus, chromium (needs root)
	tools/system.sh

extras: env ## what some tests need beside the environment, in folders of its own: bitsandbytes, Ray
	tools/extras.sh $(VENV)

lock: env ## compile requirements.in to requirements.lock, keeping the versions that still fit (UPGRADE=1: the newest)
	grep -v '^torch==' requirements.lock > .lock.tmp
	uv pip compile -q $(if $(UPGRADE),-U) --no-header --no-emit-index-url --no-emit-find-links --annotation-style line \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} -o .lock.tmp requirements.in
	# what belongs to one machine stays out: local versions such as +cpu, and the CUDA packages, which torch itself pins
	sed -E -e 's/^([A-Za-z0-9._-]+==[^ +]+)\+[A-Za-z0-9.]+/\1/' -e '/^(nvidia|cuda|triton)/d' .lock.tmp > requirements.lock
	rm .lock.tmp
	$(MAKE) env
	LLMKIT_RESOLVE=1 pytest tests/repo/test_lock.py

# -- the pipeline -----------------------------------------------------------------------------------------------

repro: env ## the whole pipeline, from records to a registered version, and where to look afterwards
	llmkit repro

MODEL ?= artifacts/base/base
smoke: env ## a model answers fixture prompts in under 30 s (MODEL=a base, delta, or bundle folder; the default is made)
	[ -e $(MODEL) ] || dvc repro -q -s base
	llmkit smoke $(MODEL)

BANKING77 ?= examples/banking77/data
banking77: env ## the same pipeline on real questions, beside a yardstick (BANKING77=the folder with its train.csv and test.csv)
	[ -f "$(BANKING77)/train.csv" ] || { echo "banking77: needs BANKING77=the folder with train.csv and test.csv; make banking77-data fetches them" >&2; exit 2; }
	[ -f examples/banking77/data/train.csv ] || ln -sfn "$(abspath $(BANKING77))" examples/banking77/data
	cd examples/banking77 && llmkit repro
	python examples/banking77/yardstick.py

banking77-data: ## fetch these questions from where they are published, held to their SHA-256 (BANKING77=the folder)
	tools/banking77.sh "$(BANKING77)"

bench: $(VENV)/.bench ## the benchmarks, as ratios within one run (BANKING77=DIR, LLAMA=DIR, BENCH="those"; see benchmarks/README.md)
	BENCH="$(BENCH)" BANKING77="$(BANKING77)" LLAMA="$(LLAMA)" tools/bench.sh

$(VENV)/.bench: $(VENV)/.installed benchmarks/requirements.txt
	$(VENV)/bin/python -m pip install -q --no-deps -r benchmarks/requirements.txt
	touch $@

cache-pull: env ## fetch results that others have made (DVC_REMOTE=a folder or https://..., or a configured remote)
	tools/cache.sh pull

cache-push: env ## share results through the same remote
	tools/cache.sh push

rollout-order: env ## an order to a running service, from a workflow (ORDER=start MODEL=… BECAUSE=…, and where the service keeps its state)
	tools/rollout_order.sh

report-pr: ## put the verdict on the pull request that brought this commit (needs gh)
	tools/report_pr.sh artifacts/gate/verdict/verdict.md

# -- proof ------------------------------------------------------------------------------------------------------

test: env system extras ## notebooks as tests, then pytest: everything (PYTEST_ARGS="-k gate" narrows pytest)
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; TMPDIR=$$tmp OMP_NUM_THREADS=1 nbdev-test
	tools/test.sh $(PYTEST_ARGS)

quick: env ## the same without the tests marked slow
	$(MAKE) test PYTEST_ARGS='-m "not slow" $(PYTEST_ARGS)'

lint: check ## what `check` does, and tests/repo: notebooks and modules in step, import arrows; changes nothing
	tools/test.sh -m "not slow" tests/repo

check: env ## style, parameters, stages, records; changes nothing, and takes seconds
	ruff check .
	ruff format --check .
	llmkit params check
	llmkit params check --project examples/banking77
	llmkit dag check
	llmkit dag check --project examples/banking77
	llmkit records check

format: env ## what ruff can mend by itself
	ruff check --fix .
	ruff format .

sync: env ## bring the generated modules, the notebooks' metadata and README.md in step
	nbdev-export
	nbdev-clean
	$(MAKE) readme

readme: env ## README.md from nbs/index.ipynb
	python tools/readme.py

hooks: env ## pre-commit hooks, and git's notebook diff and merge, for this clone only
	pre-commit install
	git config merge.jupyternotebook.driver "\"$(CURDIR)/tools/with_env.sh\" nbdev-merge %O %A %B %P"
	git config diff.jupyternotebook.command "\"$(CURDIR)/tools/with_env.sh\" nbdev-diff-driver"

# -- people -----------------------------------------------------------------------------------------------------

lab: env ## JupyterLab, with this environment as its kernel (LAB_ARGS="--no-browser --port 9000")
	python -m ipykernel install --sys-prefix --name python3 --display-name "llmkit" >/dev/null
	jupyter lab --notebook-dir=. $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

docs: env ## the site, in site/index.html; needs no network
	python tools/website

dist: env ## the wheel and the source archive, in dist/ (TAG=vX.Y.Z refuses another version)
	[ -z "$(TAG)" ] || [ "$(TAG)" = "v$$(python -c 'import llmkit; print(llmkit.__version__)')" ]
	rm -rf dist && python -m build --no-isolation

clean: ## remove what can be made again, but neither the environment nor artifacts/
	rm -rf site build dist _proc _docs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
