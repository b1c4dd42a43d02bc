"""TripoSGDiTModel, the diffusion transformer of MIDI-3D, under the official parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lora_core.errors import ConfigError, listing, near
from midi3d_lora.lora_choice import RELEASED_MULTI_INSTANCE_BLOCKS
from midi3d_lora.official import TRIPOSG
from midi3d_lora.official_model import OfficialModel
from midi3d_lora.transformer.blocks import DiTBlock, LayerNorm
from midi3d_lora.transformer.embeddings import TimestepEmbedding, timestep_embedding
from midi3d_lora.transformer.groups import GroupPlan, from_attention_kwargs, group_plan


class TripoSGDiTModel(OfficialModel, PeftAdapterMixin):
    """Predicts the velocity of a set of latent tokens, x_0 - noise, from pictures of an instance.

    A row is one instance. In the blocks of `set_multi_instance_blocks` the rows of a scene attend
    to each other; everywhere else a row is alone. `attn2.to_q` and its norms have no effect where
    the first context has a single token, as CLIP's has, and get no gradient then.

    Args (the defaults are the released values):
        num_attention_heads: H. width: W, even and a multiple of H.
        in_channels: of a latent token. num_layers: L; the blocks behind the middle take skips.
        cross_attention_dim: channels of the first context, the CLIP embedding.
        cross_attention_2_dim: channels of the second, the DINOv2 tokens.

    Raises:
        ConfigError: sizes that make no model; no second context, which is a TripoSG model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 - as diffusers declares it
    _repeated_blocks = ["DiTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        width: int = 2048,
        in_channels: int = 64,
        num_layers: int = 21,
        cross_attention_dim: int = 768,
        cross_attention_2_dim: int | None = 1024,
    ) -> None:
        super().__init__()
        _refuse_sizes(
            {
                "num_attention_heads": num_attention_heads,
                "width": width,
                "in_channels": in_channels,
                "num_layers": num_layers,
                "cross_attention_dim": cross_attention_dim,
                "cross_attention_2_dim": cross_attention_2_dim,
            }
        )
        assert cross_attention_2_dim is not None
        self.time_proj = TimestepEmbedding(width)
        self.proj_in = nn.Linear(in_channels, width)
        contexts = cross_attention_dim, cross_attention_2_dim
        self.blocks = nn.ModuleList(
            DiTBlock(width, num_attention_heads, *contexts, skip=index > num_layers // 2)
            for index in range(num_layers)
        )
        self.norm_out = LayerNorm(width)
        self.proj_out = nn.Linear(width, in_channels)
        self.gradient_checkpointing = False
        # None: nobody has said which; then scenes of several instances are refused.
        self._multi_instance: frozenset[int] | None = None

    @classmethod
    def explain_misfit(cls, names: Iterable[str]) -> str:
        """Whether the tensors are those of a TripoSG transformer."""
        return "" if any(".attn2_2." in name for name in names) else f"  {TRIPOSG}"

    # -- multi-instance attention ----------------------------------------------------------------

    @property
    def multi_instance_blocks(self) -> tuple[str, ...]:
        """The blocks whose self-attention is joint, as "blocks.8"."""
        return tuple(f"blocks.{index}" for index in sorted(self._multi_instance or ()))

    def set_multi_instance_blocks(
        self, names: Iterable[str] = RELEASED_MULTI_INSTANCE_BLOCKS
    ) -> None:
        """Choose the blocks whose self-attention runs over all tokens of a scene; empty: none.

        Raises:
            ConfigError: names that are not exactly those of blocks.
        """
        if isinstance(names, str):
            names = [names]
        known = {f"blocks.{index}": index for index in range(len(self.blocks))}
        wanted = list(names)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            hint = near(unknown[0], known)
            raise ConfigError(
                f"no blocks {', '.join(map(repr, unknown))}: the model has blocks.0 to "
                f"blocks.{len(known) - 1}{hint and '; ' + hint}"
            )
        self._multi_instance = frozenset(known[name] for name in wanted)

    def _plan(
        self,
        rows: int,
        groups: Tensor | Sequence[int] | None,
        attention_kwargs: Mapping[str, Any] | None,
        device: torch.device,
    ) -> GroupPlan | None:
        said = from_attention_kwargs(rows, attention_kwargs)
        if groups is not None and said is not None:
            raise ConfigError("pass instance_groups or num_instances in attention_kwargs, not both")
        groups = said if groups is None else groups
        plan = None if groups is None else group_plan(groups, rows, device)
        if plan is not None and self._multi_instance is None:
            raise ConfigError(
                "scenes of several instances, but no blocks for them: call "
                "set_multi_instance_blocks() for the released ones, or with [] for none"
            )
        return plan

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_2: Tensor,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        *,
        instance_groups: Tensor | Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity, [B, N, in_channels] in the model's dtype.

        Args:
            hidden_states: [B, N, in_channels] noisy latents.
            timestep: [B], or one for all rows; t = 1000 sigma, in 0..1000.
            encoder_hidden_states: [B, T1, cross_attention_dim].
            encoder_hidden_states_2: [B, T2, cross_attention_2_dim].
            attention_kwargs: the official `num_instances` and `num_instances_per_batch`.
            return_dict: False: a tuple of the tensor.
            instance_groups: [B] a whole number per row, equal for the instances of a scene. By
                default every row is a scene of its own.

        Raises:
            ConfigError: inputs that do not belong together, all of them.
        """
        first, second = encoder_hidden_states, encoder_hidden_states_2
        rows = len(hidden_states)
        t = torch.as_tensor(timestep, device=hidden_states.device)
        self._refuse_inputs(hidden_states, t, first, second)
        plan = self._plan(rows, instance_groups, attention_kwargs, hidden_states.device)
        dtype = self.norm_out.weight.dtype  # of a module that carries no adapter
        embedding = timestep_embedding(t.reshape(-1).expand(rows), self.config.width).to(dtype)
        token = self.time_proj(embedding)[:, None]  # [B, 1, W]
        x = torch.cat([token, self.proj_in(hidden_states.to(dtype))], dim=1)  # [B, 1 + N, W]
        x = self._run_blocks(x, first.to(dtype), second.to(dtype), plan)
        sample = self.proj_out(self.norm_out(x[:, 1:]))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run_blocks(
        self, x: Tensor, context: Tensor, context_2: Tensor, plan: GroupPlan | None
    ) -> Tensor:
        """The blocks with their skips: the first half pushes, the second half pops."""
        middle = len(self.blocks) // 2
        stack: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            skip = stack.pop() if index > middle else None
            joint = plan if index in (self._multi_instance or ()) else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, context, context_2, skip, joint)
            else:
                x = block(x, context, context_2, skip, joint)
            if index < middle:
                stack.append(x)
        return x

    def _refuse_inputs(self, latents: Tensor, t: Tensor, first: Tensor, second: Tensor) -> None:
        config, rows = self.config, len(latents)
        widths = {
            "hidden_states": (latents, config.in_channels),
            "encoder_hidden_states": (first, config.cross_attention_dim),
            "encoder_hidden_states_2": (second, config.cross_attention_2_dim),
        }
        problems = [
            f"{name} is {list(tensor.shape)}: expected [{rows}, tokens, {channels}]"
            for name, (tensor, channels) in widths.items()
            if tensor.ndim != 3
            or len(tensor) != rows
            or tensor.shape[2] != channels
            or not tensor.shape[1]
        ]
        if t.ndim > 1 or t.numel() not in (1, rows):
            problems.append(f"timestep is {list(t.shape)}: expected [{rows}] or one number")
        if problems:
            raise ConfigError(listing(problems))


def _refuse_sizes(sizes: Mapping[str, int | None]) -> None:
    if sizes["cross_attention_2_dim"] is None:
        raise ConfigError(f"cross_attention_2_dim is null: {TRIPOSG}")
    problems = [
        f"{name} is {size!r}: expected a whole number above 0"
        for name, size in sizes.items()
        if type(size) is not int or size < 1
    ]
    heads, width = sizes["num_attention_heads"], sizes["width"]
    if not problems and heads and width and (width % heads or width % 2):
        problems.append(f"width is {width}: expected an even multiple of {heads} heads")
    if problems:
        raise ConfigError(listing(problems))
