"""Score a network on pictures: COCO's mAP, cgF1, the loss, and what it finds where nothing is.

Each image is encoded once and each phrase once; the rest runs once per (image, phrase), a few of
them at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.cache import FeatureCache
from lora_core.frozen import Features, FrozenImages, Picture
from sam3_lora import network as net
from sam3_lora.average_precision import BEST_OF_IMAGE, MeanAveragePrecision
from sam3_lora.losses import LossSettings, loss
from sam3_lora.metrics import CONFIDENT, CgF1, Kind, Unit, false_positive_rate
from sam3_lora.outputs import Outputs, Targets
from sam3_lora.postprocess import coco_records, detections, encode_masks, keep_best, object_scores
from sam3_lora.tokenizer import CONTEXT, Tokenizer
from sam3_lora.transforms import network_input

if TYPE_CHECKING:
    from transformers import Sam3Model

    from sam3_lora.data import EvalRecord

QUERIES_AT_ONCE = 16
ABSENT_IMAGES = 50  # on which false positives are counted
# Concepts that a picture of somebody's own domain hardly holds; those of the data set are left out.
ABSENT = (
    "accordion", "anchor", "armadillo", "bagpipes", "beehive", "cactus", "camel", "canoe",
    "chandelier", "chess board", "circus tent", "cuckoo clock", "dolphin", "dragonfly", "drum kit",
    "ferris wheel", "fire hydrant", "flamingo", "giraffe", "gondola", "gramophone", "harp",
    "hot air balloon", "igloo", "jellyfish", "kangaroo", "lawn mower", "lighthouse", "lobster",
    "merry-go-round", "octopus", "ostrich", "parachute", "peacock", "penguin", "pineapple",
    "pyramid", "rocking horse", "roller skate", "saxophone", "scarecrow", "snowman",
    "space shuttle", "steam locomotive", "submarine", "totem pole", "unicycle", "volcano",
    "walrus", "windmill",
)  # fmt: skip


class EncodedPhrases:
    """Phrases as the network reads them, each encoded once.

    Args:
        texts: all phrases that will be asked for.
    """

    def __init__(self, network: Sam3Model, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self.row = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        device = next(network.parameters()).device
        features, valid = [], []
        for some in _lots(list(self.row), 4 * QUERIES_AT_ONCE):
            ids, mask = (part.to(device) for part in tokenizer(some))
            features.append(net.encode_text(network, ids, mask))
            valid.append(mask)
        self.features, self.mask = torch.cat(features), torch.cat(valid)

    @classmethod
    def one_by_one(
        cls,
        network: Sam3Model,
        tokenizer: Tokenizer,
        texts: Iterable[str],
        cache: FeatureCache | None = None,
    ) -> EncodedPhrases:
        """Each phrase encoded on its own, so that its features do not depend on the others.

        Args:
            cache: where features are kept; the text encoder must be as in the base.
        """
        found = cls.without_values(network, texts)
        device = next(network.parameters()).device
        found.features, found.mask = found.features.to(device), found.mask.to(device)
        numbers = f"{device.type} {torch.get_float32_matmul_precision()}"
        for text, row in found.row.items():
            ids, mask = (part.to(device) for part in tokenizer([text]))
            key = {
                "kind": "sam3 phrase 1",
                "base": str(network.sam3_base.fingerprint),
                "tokens": str([ids.tolist(), mask.tolist()]),
                "numbers": numbers,
            }

            def compute(ids: Tensor = ids, mask: Tensor = mask) -> Features:
                return {"features": net.encode_text(network, ids, mask)[0]}

            value = compute() if cache is None else cache.get(key, compute)
            found.features[row], found.mask[row] = value["features"].to(device), mask[0]
        return found

    @classmethod
    def without_values(cls, network: Sam3Model, texts: Iterable[str]) -> EncodedPhrases:
        """Zeros on the CPU in their place, for a network on the meta device."""
        blank = cls.__new__(cls)
        blank.row = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        shape = (len(blank.row), CONTEXT)
        blank.features = torch.zeros(*shape, network.text_projection.out_features)
        blank.mask = torch.ones(shape, dtype=torch.int64)
        return blank

    def rows(self, texts: Sequence[str]) -> Tensor:
        """i64 [P]."""
        return torch.tensor([self.row[text] for text in texts], device=self.mask.device)


def _lots(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def asked(
    network: Sam3Model,
    pixels: Picture,
    texts: Sequence[str],
    phrases: EncodedPhrases,
    masks: bool,
    frozen: FrozenImages | None = None,
) -> Iterator[tuple[Sequence[str], Outputs]]:
    """Ask one image for phrases; gives a few of them with their outputs at a time.

    Args:
        pixels: uint8 [H, W, 3], at the model's size; or what `frozen` gave for it.
    """
    if frozen is not None:
        trunk = frozen.features([pixels])["trunk"]
        features = net.feature_maps(network, trunk, masks=masks)
    else:
        assert isinstance(pixels, Tensor)
        seen = network_input([pixels.to(phrases.mask.device)])
        features = net.encode_images(network, seen, masks=masks)
    for some in _lots(texts, QUERIES_AT_ONCE):
        rows = phrases.rows(some)
        query = {
            "attention_mask": phrases.mask,
            "text_ids": rows,
            "image_ids": torch.zeros_like(rows),
        }
        yield some, net.detect(network, features, phrases.features, query, masks=masks)


@dataclass
class Scores:
    """Figures of a data set, fed image by image.

    Attributes:
        masks: score masks beside boxes.
    """

    masks: bool
    precision: dict[Kind, MeanAveragePrecision] = field(default_factory=dict)
    cgf1: dict[Kind, CgF1] = field(default_factory=dict)
    losses: list[tuple[float, int]] = field(default_factory=list)  # and over how many queries

    def __post_init__(self) -> None:
        kinds: tuple[Kind, ...] = ("segm", "bbox") if self.masks else ("bbox",)
        self.precision = {kind: MeanAveragePrecision(kind) for kind in kinds}
        self.cgf1 = {kind: CgF1(kind) for kind in kinds}

    def add(self, image: int, units: Sequence[Unit]) -> None:
        """Count all units of one image."""
        for precision in self.precision.values():
            precision.add(image, units)
        for cgf1 in self.cgf1.values():
            for unit in units:
                cgf1.add(unit)

    def figures(self) -> dict[str, float]:
        """Figures by name: those of masks where masks are scored, then those of boxes."""
        found: dict[str, float] = {}
        for kind, precision in self.precision.items():
            found |= {f"{kind}_{name}": precision.summary()[of] for name, of in AVERAGES.items()}
        kind = next(iter(self.cgf1))
        gated = self.cgf1[kind].summary()
        found |= {name: gated[of] for name, of in GATED.items()}
        queries = sum(count for _, count in self.losses)
        if queries:
            found["loss"] = sum(value * count for value, count in self.losses) / queries
        return found


AVERAGES = {"mAP": "AP", "mAP50": "AP_50", "mAP75": "AP_75"}
GATED = {
    "cgF1": "cgF1", "cgF1_50": "cgF1@0.5", "cgF1_75": "cgF1@0.75", "pmF1": "positive_micro_F1",
    "precision": "precision", "recall": "recall", "MCC": "IL_MCC", "IL_F1": "IL_F1",
    "IL_FPR": "IL_FPR",
}  # fmt: skip


@torch.no_grad()
def score(
    network: Sam3Model,
    records: Iterable[EvalRecord],
    phrases: EncodedPhrases,
    masks: bool,
    frozen: FrozenImages | None = None,
) -> Scores:
    """Run the network over pictures, in evaluation mode and under the caller's autocast.

    Args:
        frozen: that of `records`, if they have one.
    """
    scores = Scores(masks)
    for record in records:
        units: list[Unit] = []
        found = []
        first = 0
        for some, outputs in asked(network, record.pixels, record.phrases, phrases, masks, frozen):
            part = slice(first, first + len(some))
            first = part.stop
            targets = box_targets(record.truth[part], record.size, phrases.mask.device)
            value, _ = loss(outputs, targets, LossSettings(masks=False))
            scores.losses.append((float(value), len(some)))
            found += detections(outputs, [record.size] * len(some), None, BEST_OF_IMAGE)
        # What neither mAP nor cgF1 looks at is dropped before masks are brought to full size.
        found = keep_best(found, BEST_OF_IMAGE, above=CONFIDENT)
        asked_for = zip(record.categories, record.truth, record.exhaustive, found, strict=True)
        for category, truth, exhaustive, objects in asked_for:
            rles = encode_masks(objects) if masks else None
            results = coco_records(objects, record.image_id, category, rles)
            units.append(Unit(category, truth, results, exhaustive))
        scores.add(record.image_id, units)
    return scores


def box_targets(
    truth: Sequence[Sequence[dict[str, Any]]], size: tuple[int, int], device: torch.device
) -> Targets:
    """The objects of some queries as boxes in shares of the picture; crowds are none.

    Args:
        truth: of each query its COCO annotations, boxes (x, y, width, height) in pixels.
        size: (H, W) of the picture.
    """
    height, width = size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    objects = [[one["bbox"] for one in each if not one.get("iscrowd")] for each in truth]
    boxes = torch.tensor([box for each in objects for box in each], dtype=torch.float32)
    corner, extent = boxes.reshape(-1, 4).split(2, dim=1)
    shares = torch.cat([corner + extent / 2, extent], 1) / scale
    counts = torch.tensor([len(each) for each in objects])
    return Targets(shares.to(device), counts.to(device))


@torch.no_grad()
def false_positives(
    network: Sam3Model,
    words: EncodedPhrases | Tokenizer,
    records: Iterable[EvalRecord],
    known: Iterable[str],
    concepts: Sequence[str] = ABSENT,
    frozen: FrozenImages | None = None,
) -> float:
    """Share of (image, absent concept) pairs for which something is found, 0..1.

    Args:
        words: phrases with the concepts among them; or what they are encoded with.
        records: of which the first `ABSENT_IMAGES` are asked.
        known: phrases of the data set, which are left out.
        frozen: that of `records`, if they have one.
    """
    spoken = {phrase.casefold() for phrase in known}
    texts = [text for text in concepts if text.casefold() not in spoken]
    phrases = words if isinstance(words, EncodedPhrases) else EncodedPhrases(network, words, texts)
    best: list[float] = []
    for number, record in enumerate(records):
        if number == ABSENT_IMAGES:
            break
        for _, outputs in asked(network, record.pixels, texts, phrases, False, frozen):
            best += object_scores(outputs).amax(1).tolist()
    return false_positive_rate(best)
