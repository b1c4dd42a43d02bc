"""isaac-lora's part of the comparison with full fine-tuning: the demo's questions about nearness.

Training and validation pictures are the demo's, and so are all settings that are not varied here;
both methods get the depth of the pictures. The test pictures have a seed of their own, which
neither the base, the demo nor the choice of its settings has used. Beside the share of right
answers it measures what may be lost: the answers to what the base knows, about shapes, colours and
places in the same pictures.

Both methods leave the vision tower and the depth model as they are; full fine-tuning trains every
parameter of the projector and the decoder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isaac_lora.config import Config

if TYPE_CHECKING:
    from isaac_lora.data import Splits
    from isaac_lora.examples import Example
    from isaac_lora.frozen_features import FrozenFeatures
    from isaac_lora.network.isaac import IsaacForConditionalGeneration
    from isaac_lora.processing import IsaacProcessor

CPU = torch.device("cpu")

TEST_SEED = 13
TEST_SCENES, OLD_SCENES = 150, 20  # 300 questions about nearness, 360 others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The defaults of this package."""
    parser.set_defaults(rates=[3e-4, 1e-3, 3e-3], steps=228, batch_size=16, rank=16)


def prepare(args: argparse.Namespace, folder: Path) -> Comparison:
    """Write the pictures, the questions and the base."""
    from isaac_lora import demo
    from isaac_lora.demo_questions import looks
    from isaac_lora.demo_scenes import RIBS, scene

    torch.set_num_threads(1)
    data = demo.write(folder / "data", {"train": demo.SPLITS["train"], "val": demo.SPLITS["val"]})
    unseen = {f"unseen_{n:03}": scene((TEST_SEED, n), RIBS) for n in range(TEST_SCENES)}
    demo.write_split(data, "unseen", unseen)
    demo.write_split(data, "old", dict(list(unseen.items())[:OLD_SCENES]), looks)
    return Comparison(args, folder)


@dataclass
class Comparison:
    """See `compare_full_finetuning.Comparison`."""

    args: argparse.Namespace
    folder: Path
    chooses: str = "val, loss"
    compared: tuple[str, ...] = ("test, right",)
    falling: frozenset[str] = field(default_factory=lambda: frozenset(["val, loss", "test, loss"]))
    about: str = "shares of right answers, and losses of their tokens"
    sample: str = "question"

    def base(self) -> dict[str, float]:
        cfg = self.settings(self.args.rates[0], 0)
        return self.figures(self.network(cfg), cfg)

    def train(self, method: str, rate: float, seed: int) -> tuple[float, dict[str, float]]:
        from isaac_lora import model

        cfg = self.settings(rate, seed)
        network = self.network(cfg)
        total = sum(p.numel() for p in network.parameters())
        if method == "LoRA":
            model.adapted(network, cfg)
        else:
            network.requires_grad_(True)
            network.model.vision_embedding[0].requires_grad_(False)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        self.fit(network, cfg, self.folder / f"{method}-{rate:g}-{seed}")
        return trained / total, self.figures(network, cfg)

    def settings(self, rate: float, seed: int) -> Config:
        """The configuration of one run, the demo's; both methods get the same."""
        from isaac_lora import demo_run
        from isaac_lora.train import settings
        from lora_core.demo_folder import words

        args = self.args
        options = demo_run.Options(learning_rate=rate, batch_size=args.batch_size, seed=seed)
        found = demo_run.training(options, self.folder, "lora_depth")
        found |= {"lora_r": args.rank, "lora_alpha": 2 * args.rank, "max_steps": args.steps}
        cfg, _ = settings(words(found))
        return cfg

    # -- training ----------------------------------------------------------------------------------

    @cached_property
    def processor(self) -> IsaacProcessor:
        from isaac_lora import demo
        from isaac_lora.processing import IsaacProcessor

        return IsaacProcessor.from_pretrained(self.folder / "data" / demo.MODEL)

    @cached_property
    def splits(self) -> Splits:
        from isaac_lora import data

        return data.load(self.settings(self.args.rates[0], 0), self.processor)

    def network(self, cfg: Config) -> IsaacForConditionalGeneration:
        """The base, frozen."""
        from isaac_lora import model

        return model.build(cfg)

    def features(self, network: IsaacForConditionalGeneration, cfg: Config) -> FrozenFeatures:
        """What the frozen tower and the depth model make of pictures, kept for all runs."""
        from isaac_lora import frozen_features, model

        cache = frozen_features.cache_of(cfg)
        depths = model.depths_of(cfg, CPU, cache)
        rules = self.processor.rules
        return frozen_features.features_of(cfg, network, rules, depths, "fp32", cache)

    def fit(self, network: IsaacForConditionalGeneration, cfg: Config, folder: Path) -> None:
        """Train what is not frozen as `isaac-lora train` does, without its files."""
        from isaac_lora import data, objective
        from lora_core.trainer import LoraTrainer
        from lora_core.training.arguments import training_arguments

        steps = self.args.steps
        features = self.features(network, cfg)
        trainer = LoraTrainer(
            network,
            training_arguments(
                folder,
                learning_rate=cfg.learning_rate,
                weight_decay=cfg.weight_decay,
                steps=steps,
                batch_size=cfg.per_device_train_batch_size,
                max_grad_norm=cfg.max_grad_norm,
                log_steps=steps,
                seed=cfg.seed,
                device=CPU,
                trainer={"save_steps": 10**12},
            ),
            data.TrainSet(
                data.training_rows(cfg, self.splits),
                self.processor,
                cfg.seed,
                features.vision,
                features.depth,
            ),
            partial(data.collate, processor=self.processor),
            objective.loss_of(cfg, features),
            save_adapter=Path.mkdir,  # nothing is read back
            schedule=objective.schedule(cfg),
            count=data.num_label_tokens,
        )
        trainer.train()

    # -- measuring ---------------------------------------------------------------------------------

    def figures(self, network: IsaacForConditionalGeneration, cfg: Config) -> dict[str, float]:
        """Of validation and test questions, and of those that the base can answer."""
        network.eval()
        features = self.features(network, cfg)
        measure = partial(self.measured, network, features)
        val, test = measure(self.splits.val), measure(self.asked("unseen"))
        return {
            "val, right": val["exact_match"],
            "val, loss": val["loss"],
            "test, right": test["exact_match"],
            "test, loss": test["loss"],
            "other questions, right": measure(self.asked("old"))["exact_match"],
        }

    def asked(self, name: str) -> list[Example]:
        """The questions of a file."""
        from isaac_lora import demo
        from isaac_lora.question_options import QuestionOptions

        data = self.folder / "data"
        options = QuestionOptions(
            model_path=str(data / demo.MODEL),
            data_path=str(data / f"{name}.json"),
            image_folder=str(data / demo.IMAGES),
            output=str(self.folder / name),
        )
        return options.conversations(self.processor, answered=True)

    def measured(
        self,
        network: IsaacForConditionalGeneration,
        features: FrozenFeatures,
        examples: list[Example],
    ) -> dict[str, Any]:
        """What `isaac-lora evaluate` finds."""
        from isaac_lora.asking import answers
        from isaac_lora.prompts import questions_of
        from isaac_lora.validation import scores, token_loss

        questions = [question for example in examples for question in questions_of(example)]
        how: dict[str, Any] = {"batch_size": 50, "features": features}
        loss = token_loss(network, examples, self.processor, **how)
        said = answers(network, self.processor, questions, max_new_tokens=4, **how)
        return {"loss": loss, **scores(questions, said)}
