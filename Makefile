# demo and test need nothing but Python 3.10+ and this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# processes that share the tests, one core each
JOBS ?= 2
LEVEL ?= smoke
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

FUZZ_SECONDS ?= 1200

.PHONY: demo test bench bench-zoo fuzz check docs dist clean

demo: $(VENV)/installed
	rm -rf demo && mkdir demo
	cd demo && ../$(BIN)/robust-prune train --arch resnet18 \
		--model-kwargs '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8}' --cifar-stem \
		--data digits --input-size 1,16,16 --eps 0.1 \
		--epochs 10 --clean-epochs 3 --batch-size 32 --attack-steps 5 --out digits.safetensors
	cd demo && ../$(BIN)/robust-prune compress digits.safetensors --ratio 0.5 \
		--batch-size 32 --n-eval 50
	@echo "the report is demo/digits-pruned/report.html"

test: $(VENV)/installed
	$(PYTEST)

# LEVEL=cpu or gpu with DATA=folder of data sets; ONLY=some suites
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --level $(LEVEL) --jobs $(JOBS) --only $(ONLY) \
		$(if $(DATA),--data $(DATA))

bench-zoo: $(VENV)/installed
	$(BIN)/python -m benchmarks.zoo

# random networks and changed files; coverage-guided too where atheris is installed
fuzz: $(VENV)/installed
	FUZZ_EXAMPLES=2000 FUZZ_INPUTS=5000 $(BIN)/python -m pytest tests/fuzz --timeout 3600 \
		--hypothesis-profile=default
	if $(BIN)/python -c "import atheris"; then \
		$(BIN)/python -m tests.fuzz.atheris_readers $(FUZZ_SECONDS); fi

# what continuous integration runs; the tests run the pages' code blocks and the examples too
check: $(VENV)/installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the pages are site/index.html"

# wheel and source archive
dist: $(VENV)/installed
	$(BIN)/python -m hatchling build --clean

# constraints.txt holds the versions that were tried together
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
