"""`isaac-lora demo`: the main job on packaged models and generated pictures, and what depth gives.

The questions ask which of three boxes is nearest or farthest. LoRA is trained twice on them, with
depth and without. Then both answer questions about test pictures, which no training has seen: the
base, LoRA without depth, LoRA with depth, and as a control the latter with the depth of other
pictures and with the same depth everywhere. Each stage is a command that a user would type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

PROGRAM = "isaac-lora"
RUNS = {"lora": False, "lora_depth": True}  # folder of a training: with depth or not
# What is shown: its name, the evaluation, the name of the model in it.
MODELS = (
    ("base", "lora", "base"),
    ("LoRA without depth", "lora", "LoRA"),
    ("LoRA with depth", "lora_depth", "LoRA"),
    ("  depth of another picture", "lora_depth", "LoRA, shuffled depth"),
    ("  the same depth everywhere", "lora_depth", "LoRA, constant depth"),
    ("merged, with depth", "lora_depth", "merged"),
)
FIGURES = ("exact_match", "loss")
PAGES = 8  # test pictures that are drawn
PIXELS = 6  # of the drawing, for each pixel of a picture


@dataclass
class Options(demo_folder.Demo):
    """Settings of `isaac-lora demo`."""

    epochs: int = option(6, "Passes over the training questions.", "training")
    learning_rate: float = option(3e-3, "Peak learning rate.", "training")
    batch_size: int = option(16, "Questions per update.", "training")
    seed: int = option(42, "Fixes adapters and the order of questions.", "training")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `isaac-lora demo` with these words; returns the exit code.

    Raises:
        UserError: the output exists.
    """
    return demo_folder.main(PROGRAM, Options, run, argv)


@one_thread()
def run(options: Options, folder: Path) -> None:
    """All stages, in an empty folder."""
    from isaac_lora import demo, evaluate, merge, predict
    from isaac_lora.train import train

    demo.write(folder / "data")
    say(f"{folder / 'data'}: pictures and questions, a tiny Isaac, a tiny Depth Anything V2")
    for name in RUNS:
        run_verb(PROGRAM, "train", train, training(options, folder, name))
    run_verb(PROGRAM, "merge", merge.main, merging(folder))
    for name in RUNS:
        run_verb(PROGRAM, "evaluate", evaluate.main, evaluating(folder, name))
    run_verb(PROGRAM, "predict", predict.main, predicting(folder))
    draw(folder)
    say(f"\n{scores(folder)}\n\nbefore and after: {folder / 'pictures'}/*.png")
    say(f"adapter for PEFT: {folder / 'lora_depth'}")
    say(f"merged model:     {folder / 'merged'}")


# -- settings of the verbs -------------------------------------------------------------------------


def depth_of(folder: Path) -> dict[str, object]:
    """Settings of the tiny depth model."""
    from isaac_lora import demo

    return {
        "use_depth": "true",
        "depth_checkpoint_path": folder / "data" / demo.DEPTH,
        "depth_input_size": demo.DEPTH_INPUT,
    }


def training(options: Options, folder: Path, name: str) -> dict[str, object]:
    """Settings of `isaac-lora train`."""
    from isaac_lora import demo

    data = folder / "data"
    return {
        "model_path": data / demo.MODEL,
        **(depth_of(folder) if RUNS[name] else {}),
        "data_path": data / "train.json",
        "val_data_path": data / "val.json",
        "image_folder": data / demo.IMAGES,
        "output_dir": folder / name,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "cache_vision": "true",
        "eval_steps": 100,
        "save_steps": 100,
        "logging_steps": 50,
        "eval_max_new_tokens": 4,
        "seed": options.seed,
        "use_cpu": "true",
    }


def merging(folder: Path) -> dict[str, object]:
    """Settings of `isaac-lora merge`."""
    from isaac_lora import demo

    return {
        "model_path": folder / "data" / demo.MODEL,
        "adapter": folder / "lora_depth",
        "dtype": "fp32",  # the tiny base is in half precision
        "output": folder / "merged",
    }


def evaluating(folder: Path, name: str) -> dict[str, object]:
    """Settings of `isaac-lora evaluate`, which scores a training's models on the test pictures."""
    from isaac_lora import demo

    data = folder / "data"
    depth = {"merged_model": folder / "merged", "shuffled_depth": "true", "constant_depth": "true"}
    return {
        "model_path": data / demo.MODEL,
        "adapter": folder / name,
        **(depth_of(folder) | depth if RUNS[name] else {}),
        "data_path": data / "test.json",
        "image_folder": data / demo.IMAGES,
        "max_new_tokens": 4,
        "batch_size": 50,
        "device": "cpu",
        "examples": 0,
        "output": folder / "evaluation" / name,
    }


def predicting(folder: Path) -> dict[str, object]:
    """Settings of `isaac-lora predict`, for the first test picture."""
    from isaac_lora import demo

    data = folder / "data"
    return {
        "model_path": data / demo.MODEL,
        "adapter": folder / "lora_depth",
        **depth_of(folder),
        "image": data / demo.IMAGES / "test_0000.png",
        "question": ["<image>Which shape is nearest?", "<image>Which shape is farthest?"],
        "max_new_tokens": 4,
        "device": "cpu",
        "output": folder / "predicted",
    }


# -- before and after ------------------------------------------------------------------------------


def scores(folder: Path) -> str:
    """A table of what the evaluations have written."""
    from isaac_lora.evaluate import RESULTS
    from lora_core.data_file import read_json

    found = {name: read_json(folder / "evaluation" / name / RESULTS) for name in RUNS}
    rows = [
        [shown, *(found[name]["models"][model][key] for key in FIGURES)]
        for shown, name, model in MODELS
    ]
    about = f"{found['lora']['questions']} questions about test pictures, share of right answers:"
    return f"{about}\n\n{table(['', *FIGURES], rows)}"


def draw(folder: Path) -> None:
    """Write some test pictures with their depth, questions and answers."""
    from lora_core.pictures.overlay import save

    (folder / "pictures").mkdir()
    for name, picture, depth, answers in shown(folder):
        save(folder / "pictures" / f"{name}.png", before_after(picture, depth, answers))


Answers = list[tuple[str, list[tuple[str, str]]]]  # question, (who answers, answer) each


def shown(
    folder: Path,
) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float32], Answers]]:
    """Name, picture, depth [S, S] by the depth model, and what was said, of test pictures."""
    from isaac_lora import demo
    from isaac_lora.depth.estimator import read_depth_estimator
    from lora_core.pictures.files import read_image

    data = folder / "data"
    estimator = read_depth_estimator(data / demo.DEPTH, demo.DEPTH_INPUT)
    for name, said in list(answers(folder).items())[:PAGES]:
        picture = read_image(data / demo.IMAGES / f"{name}.png")
        yield name, picture, estimator.normalised(picture).numpy(), said


def answers(folder: Path) -> dict[str, Answers]:
    """What every model has said of each test picture."""
    import csv

    from isaac_lora.evaluate import ANSWERS

    read = {}
    for name in RUNS:
        with open(folder / "evaluation" / name / ANSWERS, encoding="utf-8", newline="") as file:
            read[name] = list(csv.DictReader(file))
    found: dict[str, Answers] = {}
    for number, row in enumerate(read["lora"]):
        said = [(who.strip(), read[name][number][model]) for who, name, model in MODELS[:3]]
        question = row["question"].removeprefix("<image>")
        picture = row["id"].split(" ")[0].rpartition("_")[0]
        found.setdefault(picture, []).append((question, [*said, ("truth", row["truth"])]))
    return found


def before_after(
    picture: NDArray[np.uint8], depth: NDArray[np.float32], answers: Answers
) -> NDArray[np.uint8]:
    """A picture beside its depth, and below them what was asked and said.

    Args:
        picture: [H, W, 3]. depth: [S, S], 0..1, near is white.

    Returns:
        uint8 [H', W', 3].
    """
    import numpy as np
    from PIL import Image

    from isaac_lora.answers.page import text_block
    from lora_core.pictures.overlay import panels

    size = picture.shape[1] * PIXELS, picture.shape[0] * PIXELS
    grey = np.repeat(np.round(255 * depth).astype(np.uint8)[..., None], 3, axis=2)
    sharp, smooth = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
    both = panels(
        [
            ("picture", np.asarray(Image.fromarray(picture).resize(size, sharp))),
            ("depth, near is white", np.asarray(Image.fromarray(grey).resize(size, smooth))),
        ]
    )
    texts = [line for question, said in answers for line in [("question", question), *said]]
    return np.concatenate([both, text_block(texts, both.shape[1])])
