"""What a narrower network took over, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class NarrowReport:
    """What a narrower network took over and how well it reproduces its source.

    Attributes:
        source_parameters: Parameters of the source.
        parameters: Parameters of the target.
        inherited: Parameters of the target that were sliced from the source, before the refit.
        images: Images the refit read.
        held_out: Further images, on which the errors are measured.
        before: Squared error of each map that enters the head, over the variance of the source's at the same channels,
            with slicing alone; by level, finest first. Each channel varies around its own mean, so that 1 is what a
            constant map would get.
        after: The same after the refit.
        seconds: Time it took.
    """

    source_parameters: int
    parameters: int
    inherited: int
    images: int
    held_out: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    seconds: float

    @property
    def share(self) -> float:
        """Inherited share of the target's parameters, 0 to 1."""
        return self.inherited / self.parameters

    def summary(self) -> str:
        """Return one line."""
        errors = [", ".join(f"{error:.3g}" for error in errors) for errors in (self.before, self.after)]
        return (
            f"narrowed from {self.source_parameters / 1e6:.3f} M to {self.parameters / 1e6:.3f} M parameters, "
            f"{100 * self.share:.1f} % inherited; relative squared error of the head's inputs {errors[0]} sliced, "
            f"{errors[1]} refitted on {self.images} images, in {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "share": self.share}
