"""`scenesplat-lora prepare text`: text embeddings of class names by the text tower of SigLIP 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from lora_core.config import option, parse
from lora_core.errors import ConfigError, listing
from lora_core.guards import unnamed
from lora_core.preflight import writable
from lora_core.report import say

TEXT = "Make text embeddings of class names with the text tower of a SigLIP 2 model folder."


@dataclass(kw_only=True)
class Options:
    """Settings of `scenesplat-lora prepare text`."""

    model: str = option(
        MISSING, "Model folder of SigLIP 2, such as siglip2-base-patch16-512.", "classes"
    )
    names: str = option(MISSING, "Class names, one per line.", "classes")
    output: str = option(
        "classes.npz", "Where to: .npz, or .pt with a .txt of names as the official files.", "run"
    )
    template: str = option("this is a {label}", "The prompt; {label} is the name.", "classes")
    prompt_classes: list[int] = option(
        [],
        "Class number of each line, where several lines are of one class, which has the name of "
        "its first line.",
        "classes",
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "Where to compute.", "run")
    overwrite: bool = option(False, "Replace a file that is there.", "run")

    def __post_init__(self) -> None:
        problems = list(unnamed(self, ("model", "names", "output")))
        output = Path(self.output)
        if output.suffix not in (".npz", ".pt"):
            problems.append(f"--output is {self.output}: it must end in .npz or .pt")
        if output.suffix == ".pt" and self.prompt_classes:
            problems.append("--prompt_classes: a .pt has no place for them: give an .npz")
        if "{label}" not in self.template:
            problems.append(f"--template is {self.template!r}: it needs {{label}} for the name")
        problems += [
            f"--output: {path.absolute()} is there: add --overwrite, or choose another name"
            for path in self.replaced()
            if not self.overwrite
        ]
        if problems:
            raise ConfigError(listing(problems))

    def replaced(self) -> list[Path]:
        """Files that are there and would be written anew, but for --names itself."""
        files = [Path(self.output)]
        if files[0].suffix == ".pt":
            files.append(files[0].with_suffix(".txt"))
        given = Path(self.names).resolve()
        return [file for file in files if file.exists() and file.resolve() != given]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the step; returns the process exit code.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot work, before weights are read.
    """
    options = parse(Options, argv or [], prog="scenesplat-lora prepare text", description=TEXT)
    writable(Path(options.output).absolute().parent, "--output")
    from lora_core.training.arguments import choose_device
    from scenesplat_lora.language import text_embeddings
    from scenesplat_lora.language.siglip import embed_texts

    device = choose_device(options.device)
    names = text_embeddings.read_names(options.names)
    text_embeddings.check_names(names, options.prompt_classes or None, where=options.names)
    text = embed_texts(options.model, names, options.template, device)
    if options.prompt_classes:
        text = text_embeddings.grouped(text, options.prompt_classes)
    text_embeddings.write_text_embeddings(options.output, text)
    count, width = text.features.shape
    say(f"text: {count} texts, {len(text.names)} classes, width {width} -> {options.output}")
    return 0
