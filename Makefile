# `make demo` and `make test` need nothing but Python 3.10 or later: both create .venv and install into it first.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# Of these packages little or nothing is imported: Python compiles that as it goes.
UNREAD := tests|testing|transformers/models|_inductor|plotly|openai|nltk|networkx|mypy|pip|setuptools|fontTools|pygments

.PHONY: install demo test test-gpu check lint format docs docs-site dist clean

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/zopro demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# On a machine with a GPU: decoding from captured graphs held equal to the plain loop.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m cuda $(ARGS)

# What finds most for its time: no second process, hardly a whole run.
FAST := tests/test_*.py tests/zo tests/tasks tests/judges tests/rewards tests/store tests/config tests/weights \
	tests/train/test_objectives.py tests/train/test_advantages.py tests/cli/test_cli.py tests/cli/test_option_values.py \
	tests/analysis/test_metrics.py tests/analysis/test_shapes.py tests/compare/test_plan.py \
	tests/engine/local/test_logprobs.py tests/engine/local/test_scores.py

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(FAST) --ignore tests/zo/test_ranks.py --ignore tests/test_blocks.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/make_configuration.py

# The pages of docs as a site, in site/; a broken link or a name that does not exist fails. `make docs-site ARGS=serve` shows it.
docs-site: $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs $(or $(ARGS),build --strict --quiet)

# What a release uploads, in dist/: the sdist, and the wheel that is built from it. tests/test_dist.py says what is in them.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m hatchling build -t sdist -d dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

$(INSTALLED):
	$(PYTHON) -m venv .venv
	$(PIP) --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/($(UNREAD))/' .venv/lib || true  # as pip would, but on all cores
	rm -f .venv/installed-*
	touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
