"""Weights from elsewhere → a run without training: calibrated on dev, judged, and used like any other run."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from model.initial import Start
from model.networks import build_network, load_initial
from model.runs.config import Config, Setup, name_outputs, open_start
from model.runs.folder import fuse, open_run, record_environment, save_best
from model.runs.job import open_job
from model.runs.overlap import list_seen
from model.runs.results import finish_run
from pipeline.base.errors import SettingError
from pipeline.console import say
from pipeline.measure.evaluation import Evaluation


def choose_settings(start: Start, config: Config, source: Path, arch: str | None) -> Config:
    """The configuration of the run that adopts these weights: settings in their file take precedence over defaults.

    Reports which labels are left out, and why. Raises SettingError if neither the file nor an option gives a setting.
    """
    if not (arch or start.arch):
        raise SettingError(f"{start.path} does not say which network it is for: name it by `arch`")
    known = tuple(label for label in config.labels if label in start.outputs)
    if not known:
        raise SettingError(
            f"{start.path}: no output of {', '.join(config.labels)} is known: name them by `init_labels`"
        )
    if lacking := [label for label in config.labels if label not in known]:
        say(f"{start.path}: no trained output for {', '.join(lacking)}: left out")
    if not start.scale:
        say(f"{start.path}: its gray scale is not known: images are scaled by the shards' mean and std")
    return replace(
        config,
        arch=arch or start.arch,
        labels=known,
        uncertain="ignore",  # there is no training
        adopted=str(source),
    )


def adopt_weights(config: Config, setup: Setup, run: Path, arch: str | None) -> list[Evaluation]:
    """Write a run of the weights of `setup.init`; returns its evaluations on dev and valid.

    Raises DataError if the weights do not fit or were trained on dev or valid, or if the folder is another run's.
    """
    start = open_start(config, setup.init)
    if start is None or setup.init is None:
        raise SettingError("adopt needs the weights of `init`: a file, a run, or published ones")
    job = open_job(choose_settings(start, config, setup.init, arch), setup, run)
    outputs = name_outputs(job.config)
    torch.manual_seed(job.config.seed)  # for the unused outputs
    network = build_network(job.config.arch, len(outputs), job.config.shape)
    say(f"{start.path}: {load_initial(network, start, outputs, job.config.labels)}")
    seen = list_seen(job, ["dev"])
    open_run(run, job.config)
    record_environment(job)
    save_best(job, seen, fuse(network, job.config).state_dict(), 0.0, math.nan)
    return list(finish_run(job).values())
