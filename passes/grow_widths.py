"""The pass that carries out what a plan grows."""

from __future__ import annotations

from fxwidth.passes.shrink_widths import ShrinkWidths


class GrowWidths(ShrinkWidths):
    """Carries out what a plan grows; what the plan of `PlanWidths` shrinks is left in `gm.meta` for `ShrinkWidths`.

    Args:
        plan: as for `ResizeWidths`; one that shrinks a group is refused.
        options: those of `ResizeWidths`.

    Raises:
        FxwidthError: as of `ResizeWidths`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.passes.GrowWidths({"0": 24})(gm).graph_module.get_parameter("0.weight").shape
        torch.Size([24, 8])
        >>> fxwidth.passes.GrowWidths({"0": 12})(gm)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fxwidth.errors.FxwidthError: GrowWidths was given a plan that brings group '0' from 24 to 12; leave it out, ...
    """

    grows = True
