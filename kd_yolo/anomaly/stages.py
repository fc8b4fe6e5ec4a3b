"""Cut a network that runs one module after the other into stages that end at given strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PROBE_PX = 128  # side of the image on which strides are read: no two strides up to 64 give maps of one size


class Stages(nn.Module):
    """Parts of a network, each of which ends at a map that is wanted.

    Args:
        parts: The modules of each part.
        strides: Stride of the map that each part ends at, in pixels.
        channels: Channels of that map.

    Attributes:
        channels: Channels by stride.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Module]], strides: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in parts)
        self.strides = tuple(strides)
        self.channels = dict(zip(strides, channels, strict=True))

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Return maps (B, C_s, H / s, W / s) by stride s."""
        maps: dict[int, Tensor] = {}
        for stride, part in zip(self.strides, self.parts, strict=True):
            x = maps[stride] = part(x)
        return maps


def cut(chain: Sequence[nn.Module], strides: Sequence[int], depth: int | None = None) -> Stages:
    """Cut a chain after the last module of each stride, and drop what follows the last.

    Args:
        chain: Modules from the image on, each fed with the output of the one before; at most the last ones may be no
            longer maps.
        strides: Wanted strides in pixels, ascending.
        depth: Modules to keep of the last stride; None for all.

    Raises:
        ValueError: A stride does not occur, or its stage is shallower than ``depth``; the message says which do.
    """
    shapes = probe(chain)
    ends: list[int] = []
    for stride in strides:
        found = [index for index, (_, module_stride) in enumerate(shapes) if module_stride == stride]
        if not found:
            known = ", ".join(str(known) for known in sorted({shape[1] for shape in shapes}))
            raise ValueError(f"has no feature map of stride {stride} (it has {known})")
        if stride == strides[-1] and depth is not None:
            if depth > len(found):
                raise ValueError(f"has {len(found)} blocks at stride {stride}, not {depth}")
            found = found[:depth]
        ends.append(found[-1])
    starts = [0, *(end + 1 for end in ends[:-1])]
    parts = [list(chain[start : end + 1]) for start, end in zip(starts, ends, strict=True)]
    return Stages(parts, strides, [shapes[end][0] for end in ends])


@torch.no_grad()
def probe(chain: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Return channels and stride after each module, up to the first whose output is no feature map."""
    first = next((value for module in chain for value in module.state_dict().values()), torch.zeros(()))
    x = torch.zeros(1, 3, PROBE_PX, PROBE_PX, device=first.device)
    shapes: list[tuple[int, int]] = []
    for module in chain:
        was_training = module.training
        try:
            x = module.eval()(x)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            break
        finally:
            module.train(was_training)
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] != x.shape[3] or PROBE_PX % x.shape[2]:
            break
        shapes.append((x.shape[1], PROBE_PX // x.shape[2]))
    return shapes


def freeze_to_buffers(module: nn.Module) -> None:
    """Turn every parameter into a buffer of the same name, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach().clone())
