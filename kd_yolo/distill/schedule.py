"""How strongly distillation counts over a run: warm-up, decay and an end without it. Pure numbers, no torch."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kd_yolo.errors import ConfigError


class Schedule(BaseModel):
    """Factor on all distillation losses as a function of the epoch.

    A run has three parts: a linear warm-up from 0 to 1, a decay from 1 to ``final``, and a tail with factor 0. Warm-up
    and decay together are the active epochs; the decay reaches ``final`` at their end. Rules that keep short runs
    meaningful, so that at least one whole epoch always has a factor above 0:

    - ``off_last: mosaic`` switches off for the last ``close_mosaic`` epochs, as RTMDet does, but for at most half of
      the run (rounded down). A number is taken as it is, and refused when it would leave no epoch.
    - Warm-up takes at most half of the active epochs, and one shorter than an epoch is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    warmup: float = Field(default=0.1, ge=0.0, le=1.0, description="fraction of all epochs with a linear warm-up")
    final: float = Field(default=0.01, ge=0.0, le=1.0, description="factor at the end of the decay")
    decay: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="cosine, linear or constant")
    off_last: int | Literal["mosaic"] | None = Field(
        default="mosaic", description="last epochs without distillation: a number, mosaic (close_mosaic) or null"
    )

    @field_validator("off_last", mode="before")
    @classmethod
    def _epochs_mosaic_or_none(cls, value: Any) -> Any:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not (is_count or value is None or value == "mosaic"):
            raise ValueError("give a number of epochs (0 or more), mosaic or null")
        return value

    def active_epochs(self, epochs: int, close_mosaic: int = 0) -> int:
        """Return the number of epochs, counted from the start, that have distillation; at least 1.

        Args:
            epochs: Epochs of the run.
            close_mosaic: Ultralytics' argument of that name, the last epochs without mosaic augmentation.

        Raises:
            ConfigError: ``epochs`` is below 1, or ``off_last`` leaves no epoch.
        """
        if epochs < 1:
            raise ConfigError(f"epochs={epochs}: a distillation schedule needs at least 1 epoch")
        if self.off_last == "mosaic":
            return epochs - min(max(close_mosaic, 0), epochs // 2)
        tail = self.off_last or 0
        if tail >= epochs:
            raise ConfigError(
                f"schedule.off_last={tail} leaves no epoch of epochs={epochs} with distillation; lower it or use mosaic"
            )
        return epochs - tail

    def warmup_epochs(self, epochs: int, close_mosaic: int = 0) -> float:
        """Return when warm-up ends, in epochs from the start; 0 when there is none.

        Raises:
            ConfigError: As for ``active_epochs``.
        """
        length = min(self.warmup * epochs, self.active_epochs(epochs, close_mosaic) / 2)
        return length if length >= 1.0 else 0.0

    def factor(self, epoch: float, epochs: int, close_mosaic: int = 0) -> float:
        """Return the factor in [0, 1] at a moment of the run.

        Args:
            epoch: Epochs done so far, from 0; a fraction is a moment within an epoch.
            epochs: Epochs of the run.
            close_mosaic: Ultralytics' argument of that name.

        Raises:
            ConfigError: ``epoch`` is negative, or as for ``active_epochs``.
        """
        if not epoch >= 0:
            raise ConfigError(f"epoch={epoch}: the moment of a run is 0 or later")
        active = self.active_epochs(epochs, close_mosaic)
        warm = self.warmup_epochs(epochs, close_mosaic)
        if epoch >= active:
            return 0.0 if active < epochs else self._decayed(1.0)
        if epoch < warm:
            return epoch / warm
        return self._decayed((epoch - warm) / (active - warm))

    def _decayed(self, progress: float) -> float:
        if self.decay == "constant":
            return 1.0
        left = 1.0 - progress if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final + (1.0 - self.final) * left
