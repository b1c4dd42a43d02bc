"""`midi3d-lora demo`: the main job on a packaged model and generated scenes: base, LoRA, merged.

Each stage is a command that a user would type. The test scenes play no part in training or in
choosing the best epoch; the merged model is scored from its folder.
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

    from midi3d_lora.meshes.extraction import Mesh

PROGRAM = "midi3d-lora"
# What the tiny base was made for; a released model takes the defaults.
SIZES = {"image_size": 64}
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 2.0}
SURFACE = {"octree_depth": 5, "coarse_depth": 4, "smooth": "false"}  # 33 points along each axis
MODELS = ("base", "LoRA", "merged")
FIGURES = ("scene_chamfer", "scene_f_score", "object_chamfer", "object_f_score", "box_iou")
SHEETS = 6  # test scenes that are drawn
PIXELS = 200  # of each view of them


@dataclass
class Options(demo_folder.Demo):
    """Settings of `midi3d-lora demo`."""

    epochs: int = option(30, "Passes over the training scenes.", "training")
    learning_rate: float = option(3e-3, "Peak learning rate.", "training")
    batch_size: int = option(4, "Scenes per update.", "training")
    seed: int = option(42, "Fixes adapters, order of scenes and noise.", "training")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `midi3d-lora demo` with these words; returns the exit code.

    Raises:
        UserError: the output exists.
    """
    return demo_folder.main(PROGRAM, Options, run, argv)


@one_thread()
def run(options: Options, folder: Path) -> None:
    """All stages, in an empty folder."""
    from midi3d_lora import demo, evaluate, merge, predict, prepare
    from midi3d_lora.train import train

    demo.write(folder / "data")
    say(f"{folder / 'data'}: meshes of generated scenes, a tiny MIDI-3D")
    for split in demo.SPLITS:
        run_verb(PROGRAM, "prepare", prepare.main, preparing(folder, split))
    run_verb(PROGRAM, "train", train, training(options, folder))
    lora = {"pretrained_model": folder / "data" / demo.MODEL, "lora_path": adapter_of(folder)}
    run_verb(PROGRAM, "merge", merge.main, {**lora, "output": folder / "merged"})
    run_verb(PROGRAM, "evaluate", evaluate.main, {**lora, **evaluating(folder)})
    run_verb(PROGRAM, "predict", predict.main, {**lora, **predicting(folder)})
    draw(folder)
    say(f"\n{scores(folder)}\n\nbefore and after: {folder / 'pictures'}/*.png")
    say(f"scenes:           {folder / 'evaluation'}/LoRA/*.glb")
    say(f"adapter:          {adapter_of(folder)}")
    say(f"adapter for PEFT: {folder / 'run' / 'adapter'}")
    say(f"merged model:     {folder / 'merged'}")


def adapter_of(folder: Path) -> Path:
    """The trained adapter in a demo folder."""
    return folder / "run" / "lora-final" / "lora_weights.pth"


# -- settings of the verbs -------------------------------------------------------------------------


def preparing(folder: Path, split: str) -> dict[str, object]:
    """Settings of `midi3d-lora prepare`."""
    from midi3d_lora import demo
    from midi3d_lora.demo_base.scenes import NUM_POINTS

    return {
        "input_dir": folder / "data" / demo.MESHES / split,
        "output_dir": folder / "scenes" / split,
        "num_samples": NUM_POINTS,
        **SIZES,
        "num_workers": 1,
    }


def training(options: Options, folder: Path) -> dict[str, object]:
    """Settings of `midi3d-lora train`."""
    from midi3d_lora import demo
    from midi3d_lora.demo_base.scenes import NUM_POINTS

    return {
        "pretrained_model": folder / "data" / demo.MODEL,
        "data_dir": folder / "scenes" / "train",
        "val_data_dir": folder / "scenes" / "val",
        "output_dir": folder / "run",
        "mi_attention_blocks": list(demo.BLOCKS),
        "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "learning_rate": options.learning_rate,
        "num_epochs": options.epochs,
        "batch_size": options.batch_size,
        "num_points": NUM_POINTS,
        **SIZES,
        "num_workers": 0,
        "preview_scenes": 0,
        "eval_every_n_epochs": 2,
        "save_every_n_epochs": options.epochs,
        "seed": options.seed,
        "device": "cpu",
    }


def evaluating(folder: Path) -> dict[str, object]:
    """Settings of `midi3d-lora evaluate`, which scores all models on the test scenes."""
    from midi3d_lora.demo_base.scenes import NUM_POINTS

    return {
        "merged_model": folder / "merged",
        "data_dir": folder / "scenes" / "test",
        "num_points": NUM_POINTS,
        **SIZES,
        **SAMPLING,
        **SURFACE,
        "save_meshes": "true",
        "output": folder / "evaluation",
    }


def predicting(folder: Path) -> dict[str, object]:
    """Settings of `midi3d-lora predict`, for the first test scene."""
    scene = shown(folder)[0]
    return {
        "rgb_image": scene / "rgb.png",
        "seg_image": scene / "seg.png",
        **SAMPLING,
        **SURFACE,
        "output": folder / "predicted" / f"{scene.name}.glb",
        "turntable": folder / "predicted" / f"{scene.name}.gif",
    }


def shown(folder: Path) -> list[Path]:
    """The test scenes that are drawn."""
    from midi3d_lora.scenes.scene_folders import list_scenes

    return list_scenes(folder / "scenes" / "test")[:SHEETS]


# -- before and after ------------------------------------------------------------------------------


def scores(folder: Path) -> str:
    """A table of what the evaluation has written: base, LoRA, merged."""
    from lora_core.data_file import read_json
    from midi3d_lora.evaluate import RESULTS

    models = read_json(folder / "evaluation" / RESULTS)["models"]
    rows = [[name, *(models[name]["mean"][key] for key in FIGURES)] for name in MODELS]
    count = len(models["LoRA"]["scenes"])
    about = f"mean of {count} test scenes, the merged model from its folder:"
    return f"{about}\n\n{table(['', *FIGURES], rows)}"


def draw(folder: Path) -> None:
    """Write a picture of some test scenes: what base and LoRA have made of each, and the truth."""
    from lora_core.pictures.files import read_image
    from lora_core.pictures.overlay import save
    from midi3d_lora import demo
    from midi3d_lora.conditioning.seg_maps import read_seg_map

    (folder / "pictures").mkdir()
    for scene in shown(folder):
        made = {
            name: meshes_of(folder / "evaluation" / name / f"{scene.name}.glb")
            for name in ("base", "LoRA")
        }
        files = sorted((folder / "data" / demo.MESHES / "test" / scene.name).iterdir())
        truth = [mesh for file in files for mesh in meshes_of(file)]
        picture, instances = read_image(scene / "rgb.png"), read_seg_map(scene / "seg.png").index
        sheet = before_after(picture, instances, {**made, "truth": truth})
        save(folder / "pictures" / f"{scene.name}.png", sheet)


def meshes_of(file: Path) -> list[Mesh]:
    """The meshes of a file; none if a model left no surface, so that there is no file."""
    import numpy as np

    from midi3d_lora.meshes.extraction import Mesh
    from midi3d_lora.meshes.mesh_loading import read_meshes

    return [
        Mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
        for mesh in (read_meshes(file, []) if file.exists() else [])
    ]


def before_after(
    picture: NDArray[np.uint8], instances: NDArray[np.integer], scenes: dict[str, list[Mesh]]
) -> NDArray[np.uint8]:
    """A picture, its instances, and what was made of it, from the front and from above.

    Args:
        picture: [S, S, 3].
        instances: integers [S, S], k + 1 where the k-th one is.

    Returns:
        uint8 [H, W, 3].
    """
    import numpy as np
    from PIL import Image

    from lora_core.pictures.overlay import panels
    from midi3d_lora.meshes.views import ABOVE, instance_colours, stage

    colours = np.concatenate([np.ones((1, 3)), instance_colours(int(instances.max()))])
    marked = (255 * colours[instances]).astype(np.uint8)
    stages = {name: stage(meshes, PIXELS) for name, meshes in scenes.items()}
    rows = []
    for name, pixels, angles in (("picture", picture, (0.0, 0.0)), ("instances", marked, ABOVE)):
        enlarged = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
        shown = [(title, one.view(*angles)) for title, one in stages.items()]
        rows.append(panels([(name, np.asarray(enlarged)), *shown]))
    return np.concatenate(rows)
