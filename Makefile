# Everyday commands. Most use the environment .venv, which the first of them creates with the interpreter PYTHON.

PYTHON ?= python3
BIN := .venv/bin
DIGITS := data/digits
LIBRARIES := kernels/lib/cpu.json
OUT ?= output/gpu
RUN := output/spatialmamba_digits/demo
# Always on the CPU, since two processes would need two GPUs.
MAIN := classification/main.py --cfg spatialmamba_digits --data-path $(DIGITS) --device cpu

.PHONY: demo demo-detection demo-segmentation test test-fast test-timm fuzz torture test-versions lint gpu docs figure wheel clean

# Train a small Spatial-Mamba on real images with two processes, then evaluate its checkpoint in a separate command.
demo: .venv/ready $(LIBRARIES)
	$(BIN)/python -m spatial_mamba.classification.demo_data $(DIGITS)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 $(MAIN) --output output --tag demo
	$(BIN)/python $(MAIN) --eval --pretrained $(RUN)/best.pth

# Make a data set of digits on photographs, train Mask R-CNN on it with two processes, test, and draw the detections.
demo-detection: .venv/openmmlab $(LIBRARIES)
	$(call OPENMMLAB_DEMO,detection,mask_rcnn_spatialmamba_fpn_digits,digits_coco)

# The same for semantic segmentation with UPerNet.
demo-segmentation: .venv/openmmlab $(LIBRARIES)
	$(call OPENMMLAB_DEMO,segmentation,upernet_spatialmamba_digits,digits_ade)

# One process per core, each with one thread, since the tests use small tensors.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 1

test: .venv/openmmlab $(LIBRARIES) lint
	$(PYTEST)

# Skip OpenMMLab and the tests marked as slow: launchers, compilers, Triton's interpreter, ONNX files.
test-fast: .venv/ready $(LIBRARIES)
	$(PYTEST) -m "not slow" --ignore=tests/openmmlab

# Run timm's own model tests, from its source distribution, on the models of this project.
test-timm: .venv/ready $(LIBRARIES)
	$(BIN)/python tests/timm_suite.py

# Give damaged and forged files to every loader: make fuzz [FUZZ="--target tar --count 1000 --seed 1"].
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m spatial_mamba.tests.fuzz $(FUZZ)

# Kill training 200 times, fail each of its writes, damage 350 checkpoints: every run must resume to the same bits.
torture: .venv/ready $(LIBRARIES)
	OMP_NUM_THREADS=1 $(BIN)/python -m spatial_mamba.tests.torture

# Run the fast tests with the oldest, pinned and newest packages: make test-versions [VERSIONS=newest].
test-versions:
	$(PYTHON) tests/versions.py $(VERSIONS)

lint: .venv/ready .venv/typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Run everything that needs a GPU, within 13 minutes, and write the results to one folder:
# make gpu OUT=folder [GPU="--steps self-test tests --seconds 300"]. This uses PYTHON with the packages it has.
# It creates no environment and downloads nothing.
gpu:
	$(PYTHON) tests/gpu_check.py $(OUT) $(GPU)

# Build the API site from the docstrings, into output/site.
docs: .venv/docs
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target output/api .
	$(BIN)/python -m mkdocs build --quiet --config-file .github/mkdocs.yml

# Redraw the README's figure.
figure: .venv/ready
	$(BIN)/python tests/overview.py

# Build the release wheel, with CPU libraries for each PyTorch release. This downloads all these releases, unless
# WHEEL_PYTHONS lists the interpreters of environments that have them.
wheel:
	$(PYTHON) tests/wheel.py --out dist $(WHEEL_PYTHONS)

clean:
	rm -rf .venv build dist *.egg-info kernels/lib $(DIGITS) $(RUN) output/site output/api
	rm -rf detection/data/digits_coco detection/work_dirs segmentation/data/digits_ade segmentation/work_dirs

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 14) else \
	  "Python 3.10 to 3.14 is needed, but this is %d.%d; choose one: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# mypy does not follow an editable install, and it names a package after its folder: link the folders by package name.
.venv/typing: .venv/ready
	mkdir -p $@
	ln -sfn ../.. $@/spatial_mamba
	ln -sfn ../../detection/mmcv_operators $@/spatial_mamba_mmcv
	touch $@

.venv/openmmlab: .venv/ready detection/requirements.txt
	$(BIN)/python -m pip install --quiet -r detection/requirements.txt
	touch $@

.venv/docs: .venv/ready .github/mkdocs.yml
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

# $(call OPENMMLAB_DEMO,package,config,data set): an existing data set is kept, and an interrupted run resumes.
define OPENMMLAB_DEMO
	$(BIN)/python -m spatial_mamba.$(1).demo_data $(1)/data/$(3)
	cd $(1) && export PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= && \
	bash ./tools/dist_train.sh $(2) 2 --resume && \
	bash ./tools/dist_test.sh $(2) "$$(cat work_dirs/$(2)/last_checkpoint)" 1 --show-dir work_dirs/$(2)/drawn
endef

# The demos and tests run on the CPU. Without a compiler the build fails with a message, and they run without native
# code, more slowly.
$(LIBRARIES): .venv/ready kernels/build.py $(wildcard kernels/csrc/cpu/*)
	-$(BIN)/python -m spatial_mamba.kernels build cpu
