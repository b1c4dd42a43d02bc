"""Made data sets of real sizes, and each package's training samples of them, for `input.py`.

Pictures are smooth shapes with grain, which JPEG and PNG take about as long for as photographs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lora_core.pictures.encodings import encode_counts, encode_runs
from lora_core.pictures.masks import trim

Place = tuple[Any, str]  # a module or class, and the name of a function that is looked up in it


@dataclass(frozen=True)
class Source:
    """The training samples of one package.

    Attributes:
        name: what a sample is. batch_size: samples of a step, the package's default.
        train: the data set. collate: samples -> batch.
        decode, resize: functions that do these parts of a sample; the rest is `targets`.
        floats: batch -> what the network reads of its pictures, made in the process that trains.
    """

    package: str
    name: str
    train: Any
    collate: Callable[[list[Any]], Any]
    batch_size: int
    decode: Sequence[Place] = ()
    resize: Sequence[Place] = ()
    floats: Callable[[dict[str, Any]], object] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def sources(folder: Path, count: int, packages: Sequence[str]) -> list[Source]:
    """Write `count` samples of each kind below `folder`, and read them as a run would."""
    made: list[Source] = []
    for package in packages:
        for make in MAKERS[package]:
            place = folder / f"{package}-{len(made)}"
            place.mkdir()
            made.append(make(place, count))
    return made


# -- pictures --------------------------------------------------------------------------------------


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """RGB uint8 [height, width, 3]: smooth shapes with grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (height, width, 1))
    return np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)


def blob(height: int, width: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """An ellipse somewhere, a tenth to a third of the picture's sides wide."""
    y, x = rng.uniform(0.2, 0.8, 2) * (height, width)
    b, a = rng.uniform(0.05, 0.17, 2) * (height, width)
    rows, columns = np.ogrid[:height, :width]
    return ((rows - y) / b) ** 2 + ((columns - x) / a) ** 2 < 1


def jpeg(path: Path, height: int, width: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path, quality=90)


# -- sam2 ------------------------------------------------------------------------------------------


def sam2_runs(folder: Path, count: int) -> Source:
    """Strips of steel, 1600 x 256, whose masks are run lengths in a table."""
    lines = ["ImageId,ClassId,EncodedPixels"]
    for number in range(count):
        rng = np.random.default_rng([1, number])
        jpeg(folder / "train_images" / f"{number}.jpg", 256, 1600, number)
        for label in (1, 3):
            mask = trim(blob(256, 1600, rng), (0, 0), (256, 1600), "")
            lines.append(f"{number}.jpg,{label},{encode_runs(mask)}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return _sam2(folder, "1600 x 256 JPEG, run lengths -> 1024 x 1024", data_format="kaggle")


def sam2_masks(folder: Path, count: int) -> Source:
    """Pictures of 1024 x 1024 with a mask of object ids beside each."""
    (folder / "masks").mkdir()
    for number in range(count):
        rng = np.random.default_rng([2, number])
        ids = np.zeros((1024, 1024), dtype=np.uint8)
        for value in range(1, 5):
            ids[blob(1024, 1024, rng)] = value
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
        jpeg(folder / "images" / f"{number}.jpg", 1024, 1024, number)
    return _sam2(folder, "1024 x 1024 JPEG, PNG mask of ids -> 1024 x 1024", mask_kind="instances")


def _sam2(folder: Path, name: str, **given: Any) -> Source:
    from sam2_lora import data
    from sam2_lora.config import Config
    from sam2_lora.image import preprocess

    cfg = Config(data_root=str(folder), val_fraction=0.5, **given)
    return Source(
        "sam2", name, data.load(cfg).train, data.collate, cfg.batch_size,
        decode=[(data, "pixels_of"), (data, "objects_of")],
        resize=[(data, "resized")],
        floats=lambda batch: torch.stack([preprocess(one, cfg.size) for one in batch["images"]]),
    )  # fmt: skip


# -- sam3 ------------------------------------------------------------------------------------------


def sam3_boxes(folder: Path, count: int) -> Source:
    return _sam3(folder, count, False)


def sam3_masks(folder: Path, count: int) -> Source:
    return _sam3(folder, count, True)


def _sam3(folder: Path, count: int, masks: bool) -> Source:
    """Pictures of 1280 x 960 with eight objects of four classes each, COCO run lengths."""
    from sam3_lora import data, demo, samples
    from sam3_lora.config import Config, Dataset, Training
    from sam3_lora.records import Record
    from sam3_lora.tokenizer import load_tokenizer
    from sam3_lora.transforms import network_input

    names = ("bolt", "nut", "washer", "screw", "plate")
    annotations = []
    for number in range(count):
        rng = np.random.default_rng([3, number])
        jpeg(folder / f"{number}.jpg", 960, 1280, number)
        for k in range(8):
            mask = blob(960, 1280, rng)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            annotations.append({
                "id": len(annotations), "image_id": number, "category_id": k % 4 + 1,
                "bbox": [int(value) for value in box], "iscrowd": 0, "area": int(mask.sum()),
                "segmentation": {"size": [960, 1280], "counts": encode_counts(mask)},
            })  # fmt: skip
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "height": 960, "width": 1280} for n in range(count)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
        "annotations": annotations,
    }
    (folder / "all.json").write_text(json.dumps(content))
    dataset = Dataset(
        train_img_folder=str(folder), train_ann_file=str(folder / "all.json"),
        val_img_folder=None, val_ann_file=None,
    )  # fmt: skip
    cfg = Config(dataset=dataset, training=Training(enable_segmentation=masks))
    words = load_tokenizer(demo.base_checkpoint().with_name("vocabulary.txt"))
    return Source(
        "sam3", f"1280 x 960 JPEG, 8 {'masks' if masks else 'boxes'} -> 1008 x 1008",
        data.load(cfg).train, partial(data.collate, tokenizer=words), cfg.training.batch_size,
        decode=[(Record, "pixels"), (Record, "instances")],
        resize=[(data, "place_picture"), (samples, "place_mask")],
        floats=lambda batch: network_input(batch["images"]),
    )  # fmt: skip


# -- scenesplat ------------------------------------------------------------------------------------

GAUSSIANS, FEATURES = 150_000, 768
VOXELS = ("grid_sample", "sphere_crop")  # what stands for resizing


def scenesplat_rooms(folder: Path, count: int) -> Source:
    """Rooms of 150 000 Gaussians on walls, floor and things, with language features."""
    from scenesplat_lora import data
    from scenesplat_lora.config import Config, Data, TrainData, ValData
    from scenesplat_lora.scenes.files import write_scene

    for number in range(min(count, 4)):
        rng = np.random.default_rng([4, number])
        coord = rng.uniform(0, (5, 4, 2.6), (GAUSSIANS, 3))
        side = rng.integers(0, 3, GAUSSIANS)
        coord[np.arange(GAUSSIANS), side] = rng.choice([0, 0.5], GAUSSIANS)
        quat = rng.normal(size=(GAUSSIANS, 4))
        quat /= np.linalg.norm(quat, axis=1, keepdims=True)
        features = rng.normal(size=(GAUSSIANS, FEATURES)).astype(np.float16)
        scene = {
            "coord": coord, "color": rng.integers(0, 256, (GAUSSIANS, 3)),
            "opacity": rng.uniform(0, 1, (GAUSSIANS, 1)),
            "scale": rng.uniform(0.002, 0.05, (GAUSSIANS, 3)),
            "quat": np.where(quat[:, :1] < 0, -quat, quat), "lang_feat": features,
            "valid_feat_mask": rng.random(GAUSSIANS) < 0.9,
        }  # fmt: skip
        write_scene(folder / "train" / f"room_{number}", scene)
    cfg = Config(
        data=Data(train=TrainData(data_root=str(folder)), val=ValData(split=[])), dry_run=True
    )
    train = data.load(cfg, data.Needs(True, 11, FEATURES)).train
    steps = [
        (step, "resize" if step.func.__name__ in VOXELS else "") for step in train.steps.args[0]
    ]
    return Source(
        "scenesplat", f"{GAUSSIANS // 1000} k Gaussians, features of {FEATURES}", train,
        partial(data.collate, mix_prob=cfg.mix_prob), cfg.batch_size,
        decode=[(data, "read_scene")], facts={"steps": steps},
    )  # fmt: skip


# -- midi3d ----------------------------------------------------------------------------------------

INSTANCES, POINTS = 4, 40_960


def midi3d_scenes(folder: Path, count: int) -> Source:
    """Scenes of 4 instances, pictures of 512 x 512, as they are without the cache."""
    return _midi3d(folder, count, kept=False)


def midi3d_cached(folder: Path, count: int) -> Source:
    """The same, from entries of the cache at the released sizes."""
    return _midi3d(folder, count, kept=True)


def _midi3d(folder: Path, count: int, kept: bool) -> Source:
    from midi3d_lora import data, encoder_cache
    from midi3d_lora.conditioning import clip, dino
    from midi3d_lora.conditioning.pixel_values import PictureSettings, write_picture_settings
    from midi3d_lora.config import Config
    from midi3d_lora.scenes import scene_folders

    for number in range(count):
        _midi3d_scene(folder / "scenes" / f"scene_{number:02}", number)
    model = folder / "model"
    for name in (clip.FOLDER, dino.FOLDER, "vae"):
        (model / name).mkdir(parents=True)
        (model / name / "config.json").write_text("{}")
    for (name, kind), side in (
        ((clip.PROCESSOR_FOLDER, clip.PROCESSOR), 224),
        ((dino.PROCESSOR_FOLDER, dino.PROCESSOR), 512),
    ):
        (model / name).mkdir()
        crop = (("height", side), ("width", side))
        settings = PictureSettings(size=(("shortest_edge", side),), crop_size=crop)
        write_picture_settings(settings, model / name, kind)
    cfg = Config(
        data_dir=str(folder / "scenes"), pretrained_model=str(model), output_dir=str(folder / "run")
    )
    scenes = data.load(cfg).train
    plan = encoder_cache.Plan(data.scene_settings(cfg), 2048, cfg.surface_draws)
    cache = encoder_cache.FeatureCache(folder / "cache", 10**11) if kept else None
    encoders = encoder_cache.FrozenEncoders(model, torch.device("cpu"))
    encodings = encoder_cache.Encodings(encoders, plan, cache)
    if cache is not None:
        for scene in scenes:
            pictures = {
                "image_embeds_1": torch.randn(INSTANCES, 1, 768),
                "image_embeds_2": torch.randn(INSTANCES, 1 + (512 // 14) ** 2, 1024),
            }
            cache.keep(encodings.picture_key(scene), pictures)
            for draw in range(plan.draws):
                latents = {name: torch.randn(INSTANCES, 2048, 64) for name in ("mean", "logvar")}
                cache.keep(encodings.surface_key(scene, draw), latents)
    return Source(
        "midi3d", f"{INSTANCES} instances, {'cached' if kept else '512 x 512, surface points'}",
        data.TrainSet(scenes, encodings, cfg, 64), data.collate, cfg.batch_size,
        decode=[
            (scene_folders, "read_seg_map"), (scene_folders, "read_image"),
            (scene_folders, "open_parts"), (scene_folders, "check_parts"),
            (encoder_cache.FeatureCache, "find"),
        ],
        resize=[
            (scene_folders, "square_pictures"), (clip, "clip_pixels"), (dino, "dino_pixels"),
        ],
    )  # fmt: skip


def _midi3d_scene(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([5, seed])
    seg = np.zeros((512, 512), dtype=np.uint8)
    seg[:256, :256], seg[:256, 256:], seg[256:, :256], seg[256:, 256:] = 0, 1, 2, 3
    seg[64:200, 64:200] = 4
    Image.fromarray(seg).save(folder / "seg.png")
    for name in ("rgb.png", "scene_rgb.png"):
        Image.fromarray(picture(512, 512, seed)).save(folder / name)
    normals = rng.normal(size=(INSTANCES, POINTS, 3))
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    centres = rng.uniform(-0.6, 0.6, (INSTANCES, 1, 3))
    points = np.concatenate([centres + 0.3 * normals, normals], axis=2)
    np.save(folder / "surface.npy", points.astype(np.float32))


# -- isaac -----------------------------------------------------------------------------------------


def isaac_conversations(folder: Path, count: int) -> Source:
    """Questions and answers about one picture of 1024 x 768."""
    from isaac_lora import data, examples
    from isaac_lora.config import Config
    from isaac_lora.conversations import samples
    from isaac_lora.pictures.pixels import normalise
    from isaac_lora.processing import IsaacProcessor

    model = Path(data.__file__).parent / "demo_base" / "model"
    processor = IsaacProcessor.from_pretrained(
        model, patch_size=16, max_num_patches=6144, min_num_patches=256, pixel_shuffle_scale=2
    )
    said = [
        {"from": "human", "value": "<image>What is in front of the red square?"},
        {"from": "gpt", "value": "A blue disk is in front of it, a little to the left."},
        {"from": "human", "value": "And which of the two is larger?"},
        {"from": "gpt", "value": "The square is larger."},
    ]
    for number in range(count):
        jpeg(folder / f"{number}.jpg", 768, 1024, number)
    records = [{"image": f"{n}.jpg", "conversations": said} for n in range(count)]
    (folder / "train.json").write_text(json.dumps(records))
    cfg = Config(
        model_path=str(model), data_path=str(folder / "train.json"), image_folder=str(folder),
        output_dir=str(folder / "run"),
    )  # fmt: skip
    rows = data.training_rows(cfg, data.load(cfg, processor))
    return Source(
        "isaac", "1024 x 768 JPEG, two questions", data.TrainSet(rows, processor, cfg.seed),
        partial(data.collate, processor=processor), cfg.per_device_train_batch_size,
        decode=[(examples, "read_picture"), (examples, "content_digest")],
        resize=[(samples, "preprocess")],
        floats=lambda batch: normalise(batch["patches"]),
    )  # fmt: skip


MAKERS: dict[str, Sequence[Callable[[Path, int], Source]]] = {
    "sam2": (sam2_runs, sam2_masks),
    "sam3": (sam3_boxes, sam3_masks),
    "scenesplat": (scenesplat_rooms,),
    "midi3d": (midi3d_scenes, midi3d_cached),
    "isaac": (isaac_conversations,),
}
