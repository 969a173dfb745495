"""Where annotated pictures come from: rendered scenes, the photographs of a package, and files of annotations."""

from __future__ import annotations

from sif_ray.config import GenerateConfig
from sif_ray.datagen.annotations import Source
from sif_ray.datagen.source.files import FileSource
from sif_ray.datagen.source.imgviz import ImgvizSource
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.datagen.source.toyworld import ToyworldSource


def make_source(config: GenerateConfig) -> Source:
    """The source that `config.source` names."""
    if config.source == "toyworld":
        return ToyworldSource(config.scenes_per_split, config.questions_per_scene, config.seed)
    if config.source == "imgviz":
        return ImgvizSource()
    return FileSource(config.source, tuple(config.input), PictureFolder.of(config.images), config.profile)
