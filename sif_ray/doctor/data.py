"""Datasets and annotation files that a run reads."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.fs as pafs

from sif_ray.config import GenerateConfig
from sif_ray.datagen.dataset import ACCEPTED, SUBSETS, read_manifest
from sif_ray.doctor.finding import Finding, fault, ok
from sif_ray.doctor.need import Dataset, Place
from sif_ray.storage import Folder, reach


def dataset_findings(data: Dataset) -> Iterator[Finding]:
    """Whether a dataset is finished, whole, and has the splits. Raises `ConfigError` where it is not there."""
    check = f"dataset: {data.field}"
    folder = Folder.open(data.place, data.field)
    manifest = read_manifest(folder)
    there = set(folder.child(ACCEPTED).names())
    files = [name.removeprefix(f"{ACCEPTED}/") for name in manifest.get("shards", {}) if name.startswith(ACCEPTED)]
    lost = sorted(set(files) - there)
    if lost:
        found = f"{data.place}: {len(lost)} of its shards are gone, e.g. {lost[0]}"
        yield fault(check, found, "copy the dataset again, or generate it again")
    counts = {name: count["accepted"] for name, count in manifest["counts"]["splits"].items()}
    if folder.exists(SUBSETS):
        counts |= {name: len(subset["sample_ids"]) for name, subset in folder.read_json(SUBSETS).items()}
    for split in data.splits:
        if not counts.get(split):
            there_are = ", ".join(f"{name} ({count})" for name, count in counts.items())
            what = "no accepted row in split" if split in counts else "no split"
            yield fault(check, f"{data.place}: {what} {split!r}; it has {there_are}", "set split to one of them")
        elif not lost:
            yield ok(check, f"{data.place}: finished, {counts[split]} rows in {split!r}")


def input_findings(place: Place) -> Iterator[Finding]:
    """Whether a file or folder is there. Raises `ConfigError` where its address cannot be reached."""
    check = f"input: {place.field}"
    _, info = reach(place.place, place.field)
    if info.type == pafs.FileType.NotFound:
        yield fault(check, f"{place.place}: not there", f"correct {place.field}, or put the files there")
    else:
        yield ok(check, f"{place.place}: there")


def generate_findings(config: GenerateConfig) -> Iterator[Finding]:
    """The annotation files, the pictures' folder and the output of a run of `generate`, as the stage itself looks at
    them. Raises `ConfigError` for what it would refuse."""
    from sif_ray.datagen.content import content_of
    from sif_ray.datagen.source.picture_folder import PictureFolder
    from sif_ray.datagen.source.rows import input_files
    from sif_ray.datagen.stage import is_finished

    if config.input:
        yield ok("input: input", f"{len(input_files(config.input))} annotation files")
    if config.images:
        PictureFolder.of(config.images).check()
        yield ok("input: images", f"{config.images}: there")
    state = (
        "finished with this configuration"
        if is_finished(Folder.open(config.output, "output"), content_of(config))
        else "can be started or continued"
    )
    yield ok("dataset: output", f"{config.output}: {state}")
