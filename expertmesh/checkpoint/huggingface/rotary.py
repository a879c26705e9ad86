"""Rotary frequencies as transformers computes them from `rope_parameters`, or `rope_scaling` and `rope_theta`.

The variants: `default` (Su et al., 2021), `linear` (Chen et al., 2023), `llama3` (Meta, 2024), `yarn` (Peng et al.,
2023) and `longrope` (Ding et al., 2024), once named `su`. `dynamic` changes with the length of a sequence, which a
cache of rotated keys cannot follow, and is refused. All of it is computed in fp32, so that the bits are those of
transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.checkpoint.huggingface.config import Config, shown
from expertmesh.model.spec import RotarySpec

MAX_HEAD_WIDTH = 2**16
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OLD_NAMES = {"su": "longrope"}
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    },
    "longrope": {
        *("factor", "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"),
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class Rope:
    """What a configuration says about rotation.

    Attributes:
        config: Where it is from.
        values: The parameters, of which `rope_type`, `rope_theta` and `original_max_position_embeddings` are set.
        max_context: Most positions that the model was made for.
        context: Positions that the imported model shall have.
    """

    config: Config
    values: Mapping[str, Any]
    max_context: int
    context: int

    @classmethod
    def read(cls, config: Config, theta: float, fraction: float = 1.0) -> Rope:
        """Reads the keys of both generations of `config.json`.

        Args:
            config: The configuration.
            theta: Default of `rope_theta`.
            fraction: Default of `partial_rotary_factor`.
        """
        legacy, current = config.table("rope_scaling"), config.table("rope_parameters")
        values = dict(legacy or current)
        for key, default in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
            outer = config.value(key)
            values.setdefault(key, default if outer is None else outer)
        values.setdefault("rope_type", values.get("type", "default"))
        max_context = config.integer("max_position_embeddings")
        original = config.value("original_max_position_embeddings")
        if original is not None or values.get("original_max_position_embeddings") is None:
            values["original_max_position_embeddings"] = max_context if original is None else original
        kind = values["rope_type"]
        if isinstance(kind, str):
            kind = values["rope_type"] = _OLD_NAMES.get(kind, kind)
        if not isinstance(kind, str) or kind not in _KEYS:
            raise config.error(f"rope_type {shown(kind)} is not implemented; implemented: {', '.join(_KEYS)}")
        allowed = _COMMON | _KEYS[kind] | {"original_max_position_embeddings"}
        unknown = sorted(key for key in values.keys() - allowed if values[key] is not None)
        if unknown:
            raise config.error(f"rotary parameters of type {kind} are not understood: {', '.join(unknown)}")
        if fraction == 1 and values["partial_rotary_factor"] != 1:
            raise config.error("partial_rotary_factor is not implemented for this model type")
        rope = cls(config, values, max_context, 0)
        return cls(config, values, max_context, rope._chosen_context())

    def _chosen_context(self) -> int:
        asked = self.config.asked_context
        if asked is not None and not 0 < asked <= self.max_context:
            raise self.config.error(f"a context of {asked} was asked for; the model has at most {self.max_context}")
        if asked is None and self.values["rope_type"] == "longrope":
            return min(self.max_context, self._original)
        return asked or self.max_context

    def spec(self, head_width: int, *, interleaved: bool = False, phi_scales: bool = False) -> RotarySpec:
        """The frequencies for heads of a width.

        Args:
            head_width: Elements of a head of which `partial_rotary_factor` are rotated.
            interleaved: Whether a pair is two neighbours.
            phi_scales: Whether the magnitude of longrope is `short_mscale` or `long_mscale`, as phimoe has it.
        """
        width = int(head_width * self._number("partial_rotary_factor"))
        if width < 2 or width % 2 or not width <= head_width <= MAX_HEAD_WIDTH:
            raise self.config.error(f"{width} of a head's {head_width} elements cannot be rotated in pairs")
        if self._number("rope_theta") <= 1:
            raise self.config.error("rope_theta must be greater than 1")
        if phi_scales and self.values["rope_type"] not in ("default", "longrope"):
            raise self.config.error(f"rope_type {self.values['rope_type']} is not implemented for this model type")
        compute = {
            "default": self._default,
            "linear": self._linear,
            "llama3": self._llama3,
            "yarn": self._yarn,
            "longrope": self._longrope,
        }[self.values["rope_type"]]
        frequencies, magnitude = compute(width)
        if phi_scales and self.values["rope_type"] == "longrope":
            magnitude = self._number("long_mscale" if self._is_long else "short_mscale")
        if not torch.isfinite(frequencies).all():
            raise self.config.error("the rotary parameters give frequencies that are not finite")
        return RotarySpec(tuple(frequencies.tolist()), interleaved, magnitude)

    @property
    def score_factor(self) -> float:
        """What latent attention's scores are multiplied by beside `head_width ** -0.5`."""
        scale = self.values.get("mscale_all_dim")
        if self.values["rope_type"] != "yarn" or not scale:
            return 1.0
        return _yarn_scale(self._factor, self._number("mscale_all_dim")) ** 2

    @property
    def _original(self) -> int:
        value = self.values["original_max_position_embeddings"]
        if type(value) is not int or value < 1:
            raise self.config.error(f"original_max_position_embeddings must be a positive number, not {shown(value)}")
        return value

    @property
    def _is_long(self) -> bool:
        return self.context > self._original

    @property
    def _factor(self) -> float:
        if self.values.get("factor") is None and self.values["rope_type"] in ("yarn", "longrope"):
            return self.max_context / self._original
        factor = self._number("factor")
        if factor <= 0:
            raise self.config.error(f"the rotary factor must be positive, not {factor}")
        return factor

    def _number(self, key: str, default: float | None = None) -> float:
        value: Any = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.config.error(f"rotary parameter {key} must be a number, not {shown(value)}")
        return value  # type: ignore[no-any-return]

    def _powers(self, width: int) -> Tensor:
        """The base to the power of 2i / width, for each pair i."""
        powers: Tensor = self._number("rope_theta") ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        return powers

    def _default(self, width: int) -> tuple[Tensor, float]:
        return 1.0 / self._powers(width), 1.0

    def _linear(self, width: int) -> tuple[Tensor, float]:
        return 1.0 / self._powers(width) / self._factor, 1.0

    def _llama3(self, width: int) -> tuple[Tensor, float]:
        """Long waves are stretched by the factor, short ones are left alone, between the two it is blended."""
        frequencies = 1.0 / self._powers(width)
        slow, fast = self._number("low_freq_factor"), self._number("high_freq_factor")
        if not 0 < slow < fast:
            raise self.config.error("llama3 needs 0 < low_freq_factor < high_freq_factor")
        waves = 2 * math.pi / frequencies
        blend = (self._original / waves - slow) / (fast - slow)
        blended = (1 - blend) * frequencies / self._factor + blend * frequencies
        is_long, is_short = waves > self._original / slow, waves < self._original / fast
        return torch.where(is_long, frequencies / self._factor, torch.where(is_short, frequencies, blended)), 1.0

    def _yarn(self, width: int) -> tuple[Tensor, float]:
        """Pairs that turn rarely within the original context are stretched, those that turn often are not."""
        factor, theta = self._factor, self._number("rope_theta")
        magnitude, scale, all_scale = (self.values.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
        if magnitude is not None:
            magnitude = float(self._number("attention_factor"))
        elif scale and all_scale:
            magnitude = _yarn_scale(factor, self._number("mscale")) / _yarn_scale(
                factor, self._number("mscale_all_dim")
            )
        else:
            magnitude = _yarn_scale(factor)

        def pair_of(turns: float) -> float:
            return width * math.log(self._original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        fast, slow = self._number("beta_fast", 32) or 32, self._number("beta_slow", 1) or 1
        if min(fast, slow) <= 0:
            raise self.config.error("beta_fast and beta_slow must be positive")
        low, high = pair_of(fast), pair_of(slow)
        if self.values.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        powers = self._powers(width)
        return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, magnitude

    def _longrope(self, width: int) -> tuple[Tensor, float]:
        """Each pair has a factor of its own, one for the original context and one for longer ones."""
        key = "long_factor" if self._is_long else "short_factor"
        factors = self.values.get(key)
        if not isinstance(factors, list) or len(factors) != width // 2:
            raise self.config.error(f"longrope needs {width // 2} numbers in {key}")
        if not all(type(entry) in (int, float) and entry > 0 for entry in factors):
            raise self.config.error(f"longrope needs positive numbers in {key}")
        if self.values.get("attention_factor") is not None:
            magnitude = float(self._number("attention_factor"))
        elif self._factor <= 1:
            magnitude = 1.0
        else:
            magnitude = math.sqrt(1 + math.log(self._factor) / math.log(self._original))
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * self._powers(width)), magnitude


def _yarn_scale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
