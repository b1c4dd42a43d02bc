"""TripoSGVAEModel: the set autoencoder that MIDI-3D's latents come from.

Li et al., "TripoSG", section 3.2, after Zhang et al., "3DShape2VecSet". As diffusers' models:
`from_pretrained`, `save_pretrained`, `config`, `encode(...).latent_dist.sample()`,
`decode(...).sample`. Nothing here depends on train() or eval().
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lora_core.errors import ConfigError, DataError
from midi3d_lora.official_model import OfficialModel
from midi3d_lora.vae.decoder import DecodedField, Decoder
from midi3d_lora.vae.encoder import Encoder
from midi3d_lora.vae.farthest_points import choose_query_points
from midi3d_lora.vae.frequencies import FrequencyEmbedding

NORMAL_CHANNELS = 3
# A query of the released decoder costs 16 kB in each of the two layers of its feed-forward:
# 10,000 of them 330 MB in float32. The official 50,000 would not fit a gigabyte.
CHUNK_SIZE = 10_000


class LatentDistribution:
    """N(mean, exp(logvar)) for each channel of each token.

    diffusers' `DiagonalGaussianDistribution` has channels in dim 1 and sums over images; tokens
    have them last.
    """

    def __init__(self, moments: Tensor) -> None:
        """`moments`: [B, N, 2 C], means and then log variances, which are clamped to [-30, 20]."""
        self.parameters = moments
        self.mean, logvar = moments.chunk(2, dim=-1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std ε, with ε ~ N(0, 1) drawn on the generator's device."""
        noise = randn_tensor(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(N(mean, var) || N(0, 1)) of each row, [B]: 0.5 Σ (mean² + var - 1 - logvar)."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2))


class TripoSGVAEModel(OfficialModel):
    """Surface points with normals to a set of latents, and latents to a field in space."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 64,
        num_attention_heads: int = 8,
        width_encoder: int = 512,
        width_decoder: int = 1024,
        num_layers_encoder: int = 8,
        num_layers_decoder: int = 16,
        embedding_type: str = "frequency",
        embed_frequency: int = 8,
        embed_include_pi: bool = False,
    ) -> None:
        super().__init__()
        _check(num_attention_heads, width_encoder, width_decoder, embedding_type)
        self.embedding = FrequencyEmbedding(embed_frequency, embed_include_pi, in_channels)
        features = self.embedding.out_channels + NORMAL_CHANNELS
        self.encoder = Encoder(features, width_encoder, num_attention_heads, num_layers_encoder)
        self.quant = nn.Linear(width_encoder, 2 * latent_channels)
        self.post_quant = nn.Linear(latent_channels, width_decoder)
        self.decoder = Decoder(
            self.embedding, width_decoder, num_attention_heads, num_layers_decoder
        )

    def encode(
        self,
        surface: Tensor,
        num_tokens: int = 2048,
        seed: int | None = None,
        return_dict: bool = True,
    ) -> AutoencoderKLOutput | tuple[LatentDistribution]:
        """Points on surfaces to the distributions of their latents; there is no scale factor.

        Args:
            surface: [B, M, 3 + 3] coordinates in about [-1, 1] and unit normals.
            num_tokens: the size of the latent set. More than M / 4 draws points twice.
            seed: which points the tokens start from; None takes others each time.

        Returns:
            `latent_dist`, a `LatentDistribution` of [B, num_tokens, latent_channels].

        Raises:
            DataError: `surface` has other columns.
        """
        channels = self.config.in_channels + NORMAL_CHANNELS
        if surface.ndim != 3 or surface.shape[2] != channels:
            raise DataError(
                f"surface points of shape {list(surface.shape)}: expected [rows, points, "
                f"{channels}], coordinates and unit normals"
            )
        sampled = choose_query_points(surface, num_tokens, seed)
        moments = self.quant(self.encoder(self._features(sampled), self._features(surface)))
        distribution = LatentDistribution(moments)
        if not return_dict:
            return (distribution,)
        return AutoencoderKLOutput(latent_dist=distribution)

    def _features(self, surface: Tensor) -> Tensor:
        """[φ(xyz), normal] of each point, in the dtype of the weights."""
        xyz, normals = surface.split([self.config.in_channels, NORMAL_CHANNELS], dim=-1)
        features = torch.cat([self.embedding(xyz), normals.float()], dim=-1)
        return features.to(self.encoder.proj_in.weight.dtype)

    def context(self, latents: Tensor) -> Tensor:
        """What queries ask: latents [B, N, C] after the decoder's self-attention, [B, N, W]."""
        return self.decoder.context(self.post_quant(latents.to(self.post_quant.weight.dtype)))

    def decode(
        self,
        latents: Tensor,
        sampled_points: Tensor,
        chunk_size: int = CHUNK_SIZE,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Values of the latents' fields, float32 [B, Q, 1].

        Args:
            latents: [B, N, latent_channels].
            sampled_points: [B, Q, 3].
            chunk_size: how many points are in memory at a time; it changes no value.
        """
        key, value = self.decoder.keys_values(self.context(latents))
        parts = sampled_points.split(chunk_size, dim=1)
        values = torch.cat([self.decoder(part, key, value) for part in parts], dim=1)
        return DecoderOutput(sample=values) if return_dict else (values,)

    def fields(self, latents: Tensor) -> Iterator[DecodedField]:
        """One after the other the fields of latents [K, N, C], as functions of points."""
        for row in latents:
            with torch.inference_mode():
                context = self.context(row[None].to(self.device))
            yield DecodedField(self.decoder, context)

    def forward(
        self,
        surface: Tensor,
        sampled_points: Tensor,
        num_tokens: int = 2048,
        seed: int | None = None,
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput:
        """Encode and decode, for training the autoencoder itself."""
        encoded = self.encode(surface, num_tokens, seed)
        assert isinstance(encoded, AutoencoderKLOutput)
        posterior = encoded.latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        decoded = self.decode(latents, sampled_points)
        assert isinstance(decoded, DecoderOutput)
        return decoded


def _check(heads: int, width_encoder: int, width_decoder: int, embedding_type: str) -> None:
    if embedding_type != "frequency":
        raise ConfigError(f"embedding_type {embedding_type!r} is not known; expected 'frequency'")
    for name, width in (("width_encoder", width_encoder), ("width_decoder", width_decoder)):
        if width % heads:
            raise ConfigError(f"{name} {width} is not a multiple of num_attention_heads {heads}")
