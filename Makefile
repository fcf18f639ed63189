# Everything a user types. `make` alone lists the targets.
defaults = $(foreach pair,$(1),$(eval $(subst =, ?= ,$(pair))))
# With neither DATA nor OUT nor finished shards: a synthetic sample, and settings that are small and quick.
ifeq ($(DATA)$(OUT)$(wildcard shards/manifest.json),)
SAMPLE := sample/CheXpert-v1.0-small/train.csv
DATA   := sample
OUT    := shards/sample
$(call defaults,SIZE=128 DEV=0.2 ARCH=rescnn LR=2e-3 BATCH=32 EPOCHS=12 SWEEP=runs/sample-sweep)
$(if $(filter stats audit train sweep evaluate,$(MAKECMDGOALS)),\
	$(info No shards and no DATA: this is the synthetic sample with small and quick settings.))
endif
$(call defaults,OUT=shards ARCH=resnet50 SWEEP=runs/sweep CROSS=runs/cross SPLIT=valid MINUTES=5)
# `cpu` installs torch's CPU build; .venv/installed keeps which one it is.
installed := $(shell cat .venv/installed 2>/dev/null)
TORCH  ?= $(installed)

# Settings that are passed on as options if they are set, and else left to the command's own defaults.
SHARDING := --size=SIZE --views=VIEWS --dev=DEV --workers=WORKERS
TRAINING := --arch=ARCH --lr=LR --weight-decay=WD --batch-size=BATCH --epochs=EPOCHS --image-size=SIZE --seed=SEED \
	--uncertain=UNCERTAIN --blank=BLANK --teacher=TEACHER --views=VIEWS --fusion=FUSION --workers=WORKERS
SEARCH   := --sampler=SAMPLER --trials=TRIALS
# What a run's folder is named by: the settings given by hand, each after a word of its own.
NAMED    := -=SIZE -lr=LR -wd=WD -batch=BATCH -epochs=EPOCHS -=UNCERTAIN -blank-=BLANK -=VIEWS -=FUSION \
	-pretrained-=PRETRAINED -seed=SEED

# A variable that nothing reads is refused: its default would stay in force without a word.
SETTINGS := DATA OUT $(sort $(filter-out -%,$(subst =, ,$(SHARDING) $(TRAINING) $(SEARCH)))) RUN SPLIT SWEEP SHARDS CROSS \
	IMAGES ARGS GPUS PRETRAINED MINUTES FUZZ_SECONDS TARGETS PYTHON TORCH TORCH_INDEX
unknown  := $(filter-out $(SETTINGS) SHELL MAKE% -%,$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(if $(unknown),$(error Unknown variable $(firstword $(unknown)); choose from $(SETTINGS)))
# Expand a leading ~ here: within quotes no shell does, and after NAME= not every shell does.
$(foreach name,DATA OUT RUN SWEEP TEACHER,$(if $(filter ~ ~/%,$(firstword $($(name)))),\
	$(eval override $(name) := $(patsubst ~,$(HOME),$(patsubst ~/%,$(HOME)/%,$($(name)))))))
$(if $(word 2,$(OUT)),$(error OUT=$(OUT): make takes no spaces there))
given    = $(filter command environment override,$(firstword $(origin $(1))))
left     = $(firstword $(subst =, ,$(1)))
right    = $(lastword $(subst =, ,$(1)))
options  = $(foreach pair,$(1),$(if $($(call right,$(pair))),$(call left,$(pair)) "$($(call right,$(pair)))"))
tagged   = $(if $(call given,$(call right,$(1))),$(call left,$(1))$($(call right,$(1))))
NAME     = $(subst /,-,$(if $(SAMPLE),sample$(call tagged,-=ARCH),$(ARCH)$(call tagged,-=OUT)))
RUN     ?= runs/$(NAME)$(subst $() ,,$(foreach pair,$(NAMED),$(call tagged,$(pair))))
$(if $(call given,TORCH),$(if $(wildcard .venv/installed),$(if $(filter-out =$(TORCH),=$(installed)),\
	$(error .venv holds the other build of torch: make clean first))))

BIN     := .venv/bin
PYTEST   = $(BIN)/python -m pytest
PARALLEL = $(PYTEST) -n auto --dist worksteal
TRAIN    = $(BIN)/python train.py
# The --: torchrun would take --run for its own. SIGUSR1 is Slurm's warning.
LAUNCH   = -m torch.distributed.run --standalone --nproc-per-node $(GPUS) --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --
LEARN    = $(call options,$(TRAINING)) $(if $(PRETRAINED),--$(if $(filter no,$(PRETRAINED)),no-)pretrained) $(ARGS)
SEARCHES = $(if $(GPUS),$(error A sweep trains each trial on one device: leave GPUS out))$(TRAIN) sweep --shards $(OUT) --sweep $(SWEEP) $(call options,$(SEARCH)) $(LEARN)
TRAINS   = $(if $(strip $(foreach name,LR WD BATCH ARCH UNCERTAIN,$(word 2,$($(name))))),$(SEARCHES),\
	$(BIN)/python $(if $(GPUS),$(LAUNCH)) train.py --shards $(OUT) --run "$(RUN)" $(LEARN))
CHECK    = $(if $(filter train,$(MAKECMDGOALS)),$(TRAINS) --check)$(if $(filter sweep,$(MAKECMDGOALS)),$(SEARCHES) --check)
WRITE    = $(BIN)/pipeline shards "$(DATA)" $(OUT) $(call options,$(SHARDING))
apt      = @command -v $(1) >/dev/null || { sudo=$$(command -v sudo); $$sudo apt-get update -q && $$sudo apt-get install -qy $(1); }
need     = @$(if $(1),,echo 'make $@ needs $(2)' >&2; exit 2)
COMPILE  = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock"

all := $(shell sed -nE 's/^([a-z0-9-]+):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))
.PHONY: always $(all)

##@ Set up
help:  ## list the targets
	@sed -nE 's/^##@ (.*)/\n\1:/p; s/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 17
setup:  ## create .venv and install the pinned packages

##@ Data
shards: $(SAMPLE)  ## write DATA (a CheXpert folder) as shards to OUT
	$(call need,$(DATA),DATA=<CheXpert folder>)
	$(WRITE) $(call options,--uncertain=UNCERTAIN --blank=BLANK) $(ARGS)
verify: $(OUT)/manifest.json  ## check the shards in OUT: hashes, structure, every image
	$(BIN)/pipeline verify $(OUT) --deep $(call options,--workers=WORKERS)
stats: $(OUT)/manifest.json  ## count the labels of the shards in OUT
	$(BIN)/pipeline stats $(OUT)
audit: $(OUT)/manifest.json  ## ask which non-disease factors predict each label of OUT
	$(BIN)/pipeline audit $(OUT) $(ARGS)

##@ Train and use
train: $(OUT)/manifest.json  ## train on OUT, or resume RUN: LR, WD, EPOCHS, BATCH, ARCH, SEED
	$(TRAINS)
sweep: $(OUT)/manifest.json  ## try several LR, WD, BATCH, ARCH, UNCERTAIN, or by TPE
	$(SEARCHES)
cross:  ## train on each of SHARDS, on all but one, on all; score all on each
	$(call need,$(word 2,$(SHARDS)),SHARDS="A B": two folders of shards or more)
	$(TRAIN) cross $(foreach folder,$(SHARDS),--shards $(folder)) --out "$(CROSS)" $(LEARN)
evaluate:  ## score RUN on SPLIT of its own shards, or of those in OUT
	$(TRAIN) evaluate $(if $(call given,OUT),--shards $(OUT)) --run "$(RUN)" --split $(SPLIT) $(call options,--workers=WORKERS) $(ARGS)
predict:  ## score IMAGES by RUN, into RUN/predictions.csv
	$(call need,$(IMAGES),IMAGES=<files or folders>)
	$(TRAIN) predict --run "$(RUN)" --out "$(RUN)/predictions.csv" $(call options,--workers=WORKERS) $(ARGS) $(IMAGES)
export:  ## write the network of RUN for other programs, as RUN/model.onnx
	$(TRAIN) export --run "$(RUN)" --out "$(RUN)/model.onnx" $(ARGS)

##@ Test
test:  ## run the tests
	$(PARALLEL)
test-cpus:  ## run the tests that compute, as CPUs with SSE4.1, AVX2 and AVX-512 do
	for cpu in default:SSE41 avx2:AVX2 $$(grep -qsw avx512f /proc/cpuinfo && echo avx512:AVX512_CORE); do \
		ATEN_CPU_CAPABILITY=$${cpu%:*} ONEDNN_MAX_CPU_ISA=$${cpu#*:} $(PARALLEL) tests/golden tests/model || exit; done
test-wheel:  ## build the wheel, and run both commands from it outside this folder
	$(PYTEST) -m wheel
test-pages:  ## look at the report in headless Chromium (installs it if needed)
	$(call apt,chromium)
	$(PYTEST) -m pages
test-s3: .venv-s3/installed  ## read shards from an object store on loopback (OpenStack Swift)
	SWIFT_BIN=.venv-s3/bin $(PYTEST) tests/pipeline/stream/test_s3.py
test-examples: .venv-examples/installed  ## train in the loops of Lightning, Accelerate and MONAI, stop and resume
	PYTHONPATH="$(CURDIR)/.venv-examples" $(PYTEST) -m examples
test-cluster: .venv-s3/installed  ## work with several processes and hosts, and lose some of them
	SWIFT_BIN=.venv-s3/bin $(PYTEST) -m cluster
docs-check:  ## run the blocks of the pages that take longer
	$(PYTEST) -m docs
soak:  ## run the slow tests, then kill processes at random for MINUTES, by SEED
	SOAK_MINUTES=$(MINUTES) SOAK_SEED=$(or $(SEED),$(shell date +%s)) $(PARALLEL) -m soak
fuzz: .venv-fuzz/installed  ## feed damaged files to every reader, FUZZ_SECONDS each (Atheris)
	PYTHONPATH=.:.venv-fuzz $(BIN)/python tests/fuzz.py
audit-deps: .venv-audit/installed  ## look the pinned packages up in the database of vulnerabilities
	.venv-audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict
docs: .venv-docs/installed  ## build the pages as a site in build/docs (MkDocs)
	$(BIN)/python -m docs.reference build/reference
	.venv-docs/bin/mkdocs build --strict --config-file .ci/mkdocs.yml
lint:  ## check style (ruff) and types (mypy)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

##@ Measure
bench-etl: .venv-peers/installed  ## measure sharding beside img2dataset, Pillow and the codec
bench-stream: .venv-peers-stream/installed  ## measure the stream beside its peers (installs ffmpeg if needed)
bench-auroc:  ## measure minutes to dev AUROC .90, beside two usual recipes
bench-scale:  ## run CheXpert's whole table through every step; measure time and memory
bench-waits: $(OUT)/manifest.json  ## measure the CPU seconds of commands on the sample's finished run
bench-etl bench-stream bench-auroc bench-scale bench-waits: bench-%:
	$(if $(filter stream,$*),$(call apt,ffmpeg))
	$(BIN)/python -m benchmarks.$* $(patsubst %/installed,--peers %/bin/python,$(filter .venv-%,$^)) $(ARGS)
bench-gpu: $(OUT)/manifest.json  ## measure the training step on a GPU: bf16 and fp16, compiled or not
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("make bench-gpu needs a GPU that torch can use")'
	for options in "--amp bf16" "--amp bf16 --compile" "--amp fp16"; do \
		$(BIN)/python -m benchmarks.step --shards $(OUT) --arch resnet50 --size 320 --batch 64 --steps 50 $$options || exit; done

##@ Maintain
pictures:  ## draw docs/pictures and docs/sample anew (installs Chromium if needed)
	$(call apt,chromium)
	$(BIN)/python -m docs.redraw
lock:  ## resolve the dependencies anew into files of pinned versions
	$(COMPILE) --extra dev pyproject.toml --output-file requirements.lock
	$(COMPILE) benchmarks/peers-stream.in --output-file benchmarks/peers-stream.txt
clean:  ## remove .venv and caches; keeps shards and runs
	rm -rf .venv .venv-* .fuzz *.egg-info .mypy_cache .pytest_cache .ruff_cache

# All but these need the pinned packages.
$(filter-out help clean,$(all)): .venv/installed
.venv/installed: requirements.lock pyproject.toml
	@.ci/install .venv $(TORCH)
# Environments of their own, of tools and of the peers of benchmarks; and folders beside the project's packages.
.venv-audit/installed .venv-docs/installed .venv-s3/installed .venv-fuzz/installed: .venv-%/installed: tests/%.txt
.venv-peers/installed .venv-peers-stream/installed: .venv-%/installed: benchmarks/%.txt
.venv-examples/installed: examples/requirements.txt
.venv-%/installed: | .venv/installed
	@.ci/install $(if $(filter fuzz examples,$*),--target) $(@D) $(filter %.txt,$^) $(if $(filter peers-stream examples,$*),--no-deps)

# With DATA given, always: shards of other data, or by other settings, are refused, and finished ones left alone.
$(OUT)/manifest.json: $(if $(call given,DATA),always) | .venv/installed $(SAMPLE)
	@$(if $(DATA),,echo 'No shards in $(OUT). Write them with: make shards DATA=<CheXpert folder> OUT=$(OUT)' >&2; exit 2)
	$(CHECK)
	$(WRITE)
sample/CheXpert-v1.0-small/train.csv: | .venv/installed
	$(BIN)/pipeline sample sample
