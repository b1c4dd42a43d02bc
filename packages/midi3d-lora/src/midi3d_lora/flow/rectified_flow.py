"""Rectified flow: straight paths from noise to data, and the Euler steps that follow them back.

    x_σ = (1 - σ) x_0 + σ ε          σ = 1 is noise, σ = 0 is data, t = 1000 σ
    v   = x_0 - ε = -dx/dσ           what the transformer of MIDI-3D predicts
    x_{σ'} = x_σ + (σ - σ') v

Liu et al., "Flow Straight and Fast" (arXiv 2209.03003). The sign is the opposite of
`diffusers.FlowMatchEulerDiscreteScheduler`, whose models predict ε - x_0: one does not replace the
other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from numpy.typing import NDArray
from torch import Tensor

from lora_core.errors import ConfigError, near

Sigmas = TypeVar("Sigmas", Tensor, NDArray[np.float64])


def interpolate(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_σ = (1 - σ) x_0 + σ ε, row by row.

    Args:
        x0: data [R, ...].
        noise: ε, the same shape and dtype.
        sigmas: float [R], 0 (data) to 1 (noise).

    Raises:
        ConfigError: another shape; broadcasting would mix rows without a word.
    """
    if x0.shape != noise.shape or sigmas.shape != x0.shape[:1]:
        raise ConfigError(
            f"data {list(x0.shape)}, noise {list(noise.shape)} and sigmas {list(sigmas.shape)}: "
            "noise has the shape of the data, and there is one sigma per row"
        )
    sigmas = sigmas.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - sigmas) * x0 + sigmas * noise


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Noise levels and Euler steps of MIDI-3D, as a scheduler of diffusers.

    Attributes:
        sigmas: float32, descending; with a last 0 after `set_timesteps`. On the CPU: a step needs
            two numbers of it, and waits for no device.
        timesteps: float32, 1000 σ for every step, on the device given to `set_timesteps`.
        num_inference_steps: None before `set_timesteps`.
    """

    order = 1  # evaluations of the model per step
    init_noise_sigma = 1.0
    sigmas: Tensor
    timesteps: Tensor
    _step_index: int | None
    _begin_index: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ) -> None:
        if num_train_timesteps < 1:
            raise ConfigError(f"num_train_timesteps: {num_train_timesteps}; it is at least 1")
        if not 0 < shift < math.inf:
            raise ConfigError(f"shift: {shift}; it is a positive number (1: none)")
        self._scale = num_train_timesteps
        self._shift = float(shift)
        self._dynamic = use_dynamic_shifting
        self.num_inference_steps: int | None = None
        levels = 1 - np.arange(num_train_timesteps) / num_train_timesteps
        # Dynamic shifting waits for the μ of `set_timesteps`.
        self._set(levels if use_dynamic_shifting else self.time_shift(levels))

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split a configuration as diffusers does, but refuse keys that nobody would read.

        Raises:
            ConfigError: such a key, as in the configuration of another scheduler.
        """
        known = cls._get_init_keys(cls) - {"self"}
        unknown = sorted(key for key in config_dict if key not in known and not key.startswith("_"))
        if unknown:
            hint = near(unknown[0], known) or f"it has {', '.join(sorted(known))}"
            raise ConfigError(
                f"{cls.config_name}: {', '.join(unknown)}: not of a RectifiedFlowScheduler; {hint}"
            )
        parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = super().extract_init_dict(
            config_dict, **kwargs
        )
        return parts

    def __len__(self) -> int:
        return self._scale

    @property
    def step_index(self) -> int | None:
        """How many of `timesteps` are done; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the steps begin; None: at the timestep of the first call."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step, so that the first call has nothing to look up on the device."""
        self._begin_index = begin_index

    def time_shift(self, sigmas: Sigmas, mu: float | None = None) -> Sigmas:
        """σ' = a σ / (1 + (a - 1) σ), with a = shift, or e^μ for dynamic shifting.

        With a = e^μ this is e^μ / (e^μ + 1/σ - 1), without its division by zero at σ = 0.

        Raises:
            ConfigError: dynamic shifting without μ, or μ without dynamic shifting.
        """
        if self._dynamic and mu is None:
            raise ConfigError("mu: the scheduler has use_dynamic_shifting, which needs it")
        if mu is not None and not self._dynamic:
            raise ConfigError(f"mu: {mu}; the scheduler has a fixed shift of {self._shift}")
        a = self._shift if mu is None else math.exp(mu)
        return a * sigmas / (1 + (a - 1) * sigmas)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Place the steps: σ_i = time_shift(1 - i / n), i = 0 ... n - 1, and a last 0.

        Args:
            num_inference_steps: n.
            device: where `timesteps` are to be; None: the CPU.
            sigmas: levels before the shift instead of 1 - i / n, descending in (0, 1].
            mu: of dynamic shifting.

        Raises:
            ConfigError: no step, other levels, or see `time_shift`.
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ConfigError(f"num_inference_steps: {num_inference_steps}; at least 1")
            levels = 1 - np.arange(num_inference_steps) / num_inference_steps
        else:
            levels = _own_levels(sigmas, num_inference_steps)
        self.num_inference_steps = len(levels)
        self._set(self.time_shift(levels, mu), device)
        self.sigmas = torch.cat([self.sigmas, torch.zeros(1)])

    def _set(self, sigmas: NDArray[np.float64], device: str | torch.device | None = None) -> None:
        self.sigmas = torch.from_numpy(sigmas).float()
        self.timesteps = torch.from_numpy(sigmas * self._scale).float().to(device)
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a timestep in `timesteps`.

        Raises:
            ConfigError: an integer, or no timestep of the present ones.
        """
        if isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and not timestep.is_floating_point()
        ):
            raise ConfigError(
                f"timestep {timestep}: an integer looks like an index; pass one of "
                "`scheduler.timesteps`, which are float"
            )
        found = (self.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero().flatten()
        if not len(found):
            raise ConfigError(
                f"timestep {float(timestep)}: none of the {len(self.timesteps)} in "
                "`scheduler.timesteps`, which are float32: pass them as they are"
            )
        return int(found[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x ← x + (σ_i - σ_{i+1}) v, in float32.

        The first call looks its timestep up; the calls after it count on.

        Args:
            model_output: v = x_0 - ε.
            timestep: one of `timesteps`, a float.
            sample: x at σ_i, the same shape.
            return_dict: False: a tuple of one tensor instead.

        Returns:
            `prev_sample`: x at σ_{i+1}, with the dtype of `model_output`.

        Raises:
            ConfigError: no `set_timesteps` before, one step too many, or another timestep.
        """
        if self.num_inference_steps is None:
            raise ConfigError("step: call set_timesteps first")
        index = self.index_for_timestep(timestep) if self._step_index is None else self._step_index
        if self._step_index is None and self._begin_index is not None:
            index = self._begin_index
        if index >= self.num_inference_steps:
            raise ConfigError(
                f"step: all {self.num_inference_steps} steps are done; call set_timesteps again"
            )
        dt = float(self.sigmas[index] - self.sigmas[index + 1])
        previous = (sample.float() + dt * model_output.float()).to(model_output.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The forward process x_σ at σ = t / 1000, for any t: training draws between the steps.

        Args:
            sample: x_0 [R, ...].
            timestep: float [R], 0 ... 1000.
            noise: ε, the shape of `sample`.
        """
        return interpolate(sample, noise, timestep.to(sample) / self._scale)


def _own_levels(sigmas: Sequence[float], count: int | None) -> NDArray[np.float64]:
    """Levels that a caller chose, as an array [n]."""
    levels = np.asarray(sigmas, np.float64)
    if levels.ndim != 1 or not len(levels) or (count is not None and count != len(levels)):
        raise ConfigError(f"sigmas: {list(levels.shape)} of them for {count} steps")
    if not (levels[-1] > 0 and levels[0] <= 1 and (np.diff(levels) < 0).all()):
        raise ConfigError(f"sigmas: {levels.tolist()}; they descend from at most 1 to above 0")
    return levels
