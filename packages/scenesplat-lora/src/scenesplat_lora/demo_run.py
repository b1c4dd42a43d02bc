"""`scenesplat-lora demo`: the main job on a packaged model and generated rooms: base, LoRA, merged.

Each stage is a command that a user would type. The test rooms play no part in training or in
choosing the best epoch; the merged model is scored from its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core import demo_folder
from lora_core.config import option
from lora_core.demo_folder import one_thread, run_verb
from lora_core.report import say, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from scenesplat_lora.scenes.scene import Scene

PROGRAM = "scenesplat-lora"
# One Gaussian of every cell is labelled; cells are half a voxel, as officially (1 cm of 2 cm).
# In such sparse rooms 25 neighbours reach over two voxels: with votes validation mIoU was lower.
LABELLING = {"first_grid": 0.05, "vote_k": 0}
PICTURES = 4  # test rooms that are drawn
WIDTH = 480  # pixels of each view of them
COLUMNS = ("mIoU", "mAcc", "fg_mIoU", "fg_mAcc")


@dataclass
class Options(demo_folder.Demo):
    """Settings of `scenesplat-lora demo`."""

    epochs: int = option(10, "Passes over the training rooms.", "training")
    learning_rate: float = option(1e-2, "Peak learning rate.", "training")
    batch_size: int = option(1, "Rooms per update.", "training")
    seed: int = option(0, "Fixes adapters, order and augmentation of rooms.", "training")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scenesplat-lora demo` with these words; returns the exit code.

    Raises:
        UserError: the output exists.
    """
    return demo_folder.main(PROGRAM, Options, run, argv)


@one_thread()
def run(options: Options, folder: Path) -> None:
    """All stages, in an empty folder."""
    from scenesplat_lora import demo, merge
    from scenesplat_lora.train import train

    demo.write(folder / "data")
    say(f"{folder / 'data'}: generated rooms by night, text embeddings, a tiny SceneSplat")
    adapter, merged = folder / "run" / "model" / "lora_best.pth", folder / "merged.pth"
    base = {"checkpoint": base_of(folder), "adapter": adapter}
    run_verb(PROGRAM, "train", train, training(options, folder))
    run_verb(PROGRAM, "merge", merge.main, {**base, "output": merged})
    evaluate(folder, {"adapted": base, "merged": {"checkpoint": merged}})
    predict(folder, {"base": {"checkpoint": base_of(folder)}, "LoRA": base})
    draw(folder, ("base", "LoRA"))
    say(f"\n{scores(folder)}\n\nbefore and after: {folder / 'pictures'}/*.png")
    say(f"adapter:          {adapter}")
    say(f"adapter for PEFT: {folder / 'run' / 'adapter'}")
    say(f"merged model:     {merged}")


def base_of(folder: Path) -> Path:
    """The tiny base in a demo folder."""
    from scenesplat_lora import demo

    return folder / "data" / demo.BASE


def texts_of(folder: Path) -> Path:
    """The text embeddings in a demo folder."""
    from scenesplat_lora import demo

    return folder / "data" / demo.TEXTS


def training(options: Options, folder: Path) -> dict[str, object]:
    """Settings of `scenesplat-lora train`."""
    return {
        "lora_training.pretrained_path": base_of(folder),
        "data.train.data_root": folder / "data",
        "data.text_embeddings": texts_of(folder),
        "data.excluded": ["wall", "floor"],
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "lora.target_modules": ["attn", "mlp"],
        "lora.encoder_only": "false",
        "optimizer.lr": options.learning_rate,
        "epoch": options.epochs,
        "batch_size": options.batch_size,
        "num_worker": 0,
        "log_steps": 40,
        "lora_training.eval_epoch": 2,
        "seed": options.seed,
        "save_path": folder / "run",
    }


# -- before and after ------------------------------------------------------------------------------


def evaluate(folder: Path, models: dict[str, dict[str, Path]]) -> None:
    """Score models, each given by its settings, on the test rooms."""
    from scenesplat_lora import evaluate as verb

    for name, model in models.items():
        settings = {
            **model,
            "data_root": folder / "data",
            "split": "test",
            "text": texts_of(folder),
            **LABELLING,
            "output": folder / "evaluation" / name,
        }
        run_verb(PROGRAM, "evaluate", verb.main, settings)


def scores(folder: Path) -> str:
    """A table of what the evaluations have written: base, LoRA, merged."""
    from lora_core.data_file import read_json
    from scenesplat_lora.evaluate import RESULTS

    adapted, merged = (
        read_json(folder / "evaluation" / name / RESULTS) for name in ("adapted", "merged")
    )
    models = {
        "base": adapted["models"]["base"],
        "LoRA": adapted["models"]["LoRA"],
        "merged": merged["models"]["model"],
    }
    rows = [[name, *(one["tester"][key] for key in COLUMNS)] for name, one in models.items()]
    about = f"{len(merged['scenes'])} test rooms, the merged model from its file:"
    return f"{about}\n\n{table(['', *COLUMNS], rows)}"


def predict(folder: Path, models: dict[str, dict[str, Path]]) -> None:
    """Label some test rooms with models, each given by its settings."""
    from scenesplat_lora import predict as verb

    for name, model in models.items():
        settings = {
            **model,
            "text": texts_of(folder),
            **LABELLING,
            "scenes": drawn(folder),
            "output": folder / "labels" / name,
        }
        run_verb(PROGRAM, "predict", verb.main, settings)


def drawn(folder: Path) -> list[Path]:
    """The test rooms that are labelled and drawn."""
    from scenesplat_lora.scenes.files import list_scenes

    return list_scenes(folder / "data", "test")[:PICTURES]


def draw(folder: Path, models: Sequence[str]) -> None:
    """Write a picture of each of these rooms: what each model has found, beside the truth."""
    from lora_core.pictures.overlay import save
    from scenesplat_lora.language.text_embeddings import read_text_embeddings
    from scenesplat_lora.scenes.files import read_scene

    names = read_text_embeddings(texts_of(folder)).names
    (folder / "pictures").mkdir()
    for room in drawn(folder):
        scene = read_scene(room, wanted=("segment",))
        labels = {name: read_labels(folder / "labels" / name / room.name) for name in models}
        save(folder / "pictures" / f"{room.name}.png", before_after(scene, labels, names))


def read_labels(folder: Path) -> NDArray[np.int32]:
    """What `predict` wrote for a room, int32 [N]."""
    import numpy as np

    labels: NDArray[np.int32] = np.load(folder / "labels.npy", allow_pickle=False)
    return labels


def before_after(
    scene: Scene, labels: dict[str, NDArray[np.int32]], names: Sequence[str]
) -> NDArray[np.uint8]:
    """A room's colours, its labels [N] by each model with their mIoU, and the truth.

    Gaussians in the air, which have no true label, are left out.

    Returns:
        uint8 [H, W, 3].
    """
    from scenesplat_lora.metrics import Confusion, final_scores
    from scenesplat_lora.picture import scene_sheet
    from scenesplat_lora.scenes.scene import take_rows

    known = scene["segment"] >= 0
    truth = scene["segment"][known]
    panels = []
    for name, found in labels.items():
        counts = Confusion(names)
        counts.add(truth, found[known])
        panels.append((f"{name}: mIoU {final_scores(counts)['mIoU']:.2f}", found[known]))
    return scene_sheet(take_rows(scene, known), [*panels, ("truth", truth)], names, width=WIDTH)
