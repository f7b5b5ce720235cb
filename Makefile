# make demo: export the demo model and ask it a question.  make test: everything CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/qavp-export --model examples/shapes_vqa/model --keep 0.125 --output demo_bundle --force
	$(BIN)/qavp-run demo_bundle --image examples/shapes_vqa/samples/00.png --prompt "What color is the cross?"

# Files whole, because their tests share exports; in order, because those with the most tests are not the slow ones.
test: lint build/tensorrt-10
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# The Python bindings of an older TensorRT, and a NumPy that its plugins work with: tests import them from here.
build/tensorrt-10: .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ 'tensorrt-cu13-bindings==10.13.3.9.post1' 'numpy<2.4'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# passes/ and engines/ are installed inside the qavp_export namespace: mypy reads an installed copy.
	rm -rf build/installed
	$(BIN)/pip install --quiet --no-deps --target build/installed .
	cd build/installed && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p qavp_export

# Pinned to the versions that the tests were written against.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,train]'
	touch $@

clean:
	rm -rf .venv build demo_bundle
