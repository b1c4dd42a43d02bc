"""`scenesplat-lora view`: look at a scene, its labels, and where any word is, in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_core.config import option, parse
from lora_core.errors import CheckpointError, ConfigError
from lora_core.guards import count_problem, unnamed
from lora_core.report import say
from scenesplat_lora.model_options import Classes, ModelOptions

if TYPE_CHECKING:
    from scenesplat_lora.language.siglip import TextTower
    from scenesplat_lora.scenes.scene import Scene
    from scenesplat_lora.scenes.sources import Source
    from scenesplat_lora.viewer_state import ViewerState

TEXT = "Look at a scene in a browser: its labels, and where any word is."


@dataclass(kw_only=True)
class Options(ModelOptions):
    """Settings of `scenesplat-lora view`."""

    scene: str = option(MISSING, "A scene folder, or a 3D Gaussian .ply file.", "data")
    siglip: str | None = option(
        None,
        "Model folder of SigLIP 2, for words that are no classes; default: --text if it is one.",
        "classes",
    )
    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0: other machines see the scene.", "run"
    )
    port: int = option(8080, "Port to listen on; 0: a free one.", "run")
    draw: Literal["gaussians", "points"] = option(
        "gaussians", "How Gaussians are drawn; points suit slow machines.", "output"
    )
    max_gaussians: int = option(
        1_000_000, "At most so many are drawn, chosen at random; all are labelled.", "output"
    )

    def problems(self) -> list[str]:
        """What is wrong with the values alone."""
        found = super().problems() + list(unnamed(self, ("scene", "siglip", "host")))
        found += count_problem(self, "max_gaussians", 1)
        if not 0 <= self.port < 65536:
            found.append(f"--port is {self.port}: it must be 0 to 65535")
        return found

    @property
    def width(self) -> int:
        """Channels of the network's features."""
        return self._network.out_channels

    def tower_folder(self) -> str | None:
        """The folder of the text tower, or None."""
        return self.siglip or (self.text if self.text and Path(self.text).is_dir() else None)

    def classes(self) -> Classes:
        """The classes; none for a language model that has a text tower for words alone."""
        if self.head is None and self.text is None and self.siglip is not None:
            return Classes(())
        return super().classes()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command until Ctrl-C; returns the process exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    options = parse(Options, argv or [], prog="scenesplat-lora view", description=TEXT)
    source = ready(options)
    state = prepared(source, options)

    from scenesplat_lora.viewer import Viewer

    viewer = Viewer(state, options.host, options.port, options.draw == "points", source.name)
    try:
        say(f"{viewer.url} shows {source.name}; Ctrl-C ends it")
        viewer.wait()
    finally:
        viewer.stop()
    return 0


def ready(options: Options) -> Source:
    """The scene; refuses what can be known before the weights are read.

    Raises:
        ConfigError: no viser, an address or device that cannot work, or several scenes.
        DataError: no scene. CheckpointError: no such base, adapter or tower, as headers tell.
    """
    from lora_core.preflight import check_all
    from scenesplat_lora.viewer import check_address, check_viser

    found: list[Source] = []
    check_all(
        check_viser,
        lambda: check_address(options.host, options.port),
        lambda: found.append(find_scene(options)),
        options.check_device,
        options.glance,
        lambda: check_tower(options),
    )
    return found[0]


def find_scene(options: Options) -> Source:
    """The scene at --scene.

    Raises:
        ConfigError: there are several. DataError: there is none.
    """
    from scenesplat_lora.scenes.sources import find_sources

    found = find_sources([options.scene])
    if len(found) > 1:
        names = ", ".join(source.name for source in found[:3])
        more = ", ..." if len(found) > 3 else ""
        raise ConfigError(f"--scene: {options.scene} holds {len(found)} scenes: {names}{more}")
    return found[0]


def check_tower(options: Options) -> None:
    """Refuse a --siglip that is no model folder, or that a segmentation model has no use for.

    Raises:
        ConfigError, CheckpointError: see `model_settings`.
    """
    if options.siglip is None:
        return
    if options.head is not None:
        raise ConfigError(
            "--siglip: a segmentation model has no language features to compare words with"
        )
    from scenesplat_lora.language.siglip import model_settings

    model_settings(Path(options.siglip))


def prepared(source: Source, options: Options) -> ViewerState:
    """Run the network over the scene and label it as `predict` does.

    Raises:
        DataError: the scene cannot be used. CheckpointError: a model that cannot.
    """
    from scenesplat_lora.language.zero_shot import vote
    from scenesplat_lora.scenes.values import LAYOUTS
    from scenesplat_lora.viewer_state import some_rows

    tower = opened_tower(options)
    scene = source.read(LAYOUTS[options.layout], options.wanted)
    say(f"{source.name}: {len(scene['coord']):,} Gaussians go through the network")
    state = state_of(scene, options)
    if options.vote_k and state.names:
        state = replace(state, prediction=vote(state.prediction, scene["coord"], k=options.vote_k))
    if tower is not None:
        state = replace(state, embed=lambda words: tower.embed_names(words).features)
    return state.take(some_rows(scene, options.max_gaussians, options.seed))


def state_of(scene: Scene, options: Options) -> ViewerState:
    """What the network says of a scene."""
    import numpy as np
    import torch

    from scenesplat_lora.labelling import label_scene
    from scenesplat_lora.language.zero_shot import label
    from scenesplat_lora.scene_features import scene_features
    from scenesplat_lora.viewer_state import ViewerState

    classes, model, how = options.classes(), options.load(), options.labelling()
    if options.head is not None:
        return ViewerState(scene, classes.names, label_scene(model, scene, None, how))
    features = scene_features(model, scene, how)
    labels = np.full(len(scene["coord"]), -1)
    if classes.text is not None:
        likeness = torch.from_numpy(features.similarity(classes.text.features))
        labels = label(torch.sigmoid(likeness), classes.text.classes, how.threshold).numpy()
    return ViewerState(scene, classes.names, labels, features, classes.text)


def opened_tower(options: Options) -> TextTower | None:
    """The text tower for queries.

    Raises:
        CheckpointError: its vectors are of another width than the network's.
    """
    folder = options.tower_folder()
    if folder is None:
        return None
    from scenesplat_lora.language.siglip import open_text_tower

    tower, width = open_text_tower(folder), options.width
    if tower.width != width:
        raise CheckpointError(
            f"--siglip: {folder} gives vectors of width {tower.width}, the model has features of "
            f"width {width}: they are of different models"
        )
    return tower
