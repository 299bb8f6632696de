"""By how much the loss rises with each group's predicted error, from probes that are few and noisy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Group = TypeVar("Group", bound=Hashable)

# A loss that rises in proportion to errors has one; the cross entropy of a sure network has two or three.
_LARGEST_POWER = 4.0
# No group is taken to matter less than this share of what the median group does.
_LEAST_SENSITIVITY = 0.05


@dataclass(frozen=True)
class Rise:
    """What one probe of a group has shown.

    Attributes:
        error: the predicted error of the width that was probed, positive.
        mean: by how much the loss was higher.
        deviation: the standard error of that mean.
    """

    error: float
    mean: float
    deviation: float

    @property
    def credible(self) -> float:
        """The rise, or where it drowns in noise the most that it may well be."""
        return max(self.mean, self.deviation)


def rates_of(rises: Mapping[Group, Sequence[Rise]], together: float | None = None) -> dict[Group, float]:
    """Return by how much the loss rises per unit of each group's predicted error.

    A network that is sure of its answers stands a little error without a rise of its loss: that of groups which shrink
    together is not the sum of what each does by itself, but grows with a power of their errors' sum, (sum of c e)^p.
    So c follows from rises to the power 1/p, which tells how sensitive the groups are for the same rise. Rates are c
    times what makes them rises of the loss per error where it rises as much as the probes made it rise on average.

    The logarithms of the rates are drawn toward their mean, the more the less the probes are sure of them.

    Args:
        rises: the probes of each group, those of smaller errors first; groups without probes get the median rate.
        together: by how much the loss was higher with all groups shrunk as for their first probes.

    Source: for how far, B. Efron and C. Morris, Stein's Estimation Rule and Its Competitors (1973), with the variance
        between groups by moments.
    """
    last = {group: probes[-1] for group, probes in rises.items() if probes and probes[-1].credible > 0}
    if not last:
        return dict.fromkeys(rises, 1.0)
    # Noise makes small rises look larger than they are, and the power of one group's smaller.
    power = max(_power(rises), _power_together([(rises[group][0], probe) for group, probe in last.items()], together))
    logs = np.log([probe.credible for probe in last.values()])
    errors = np.log([probe.error for probe in last.values()])
    noise = np.array([probe.deviation / probe.credible for probe in last.values()]) / power
    unit = float(logs.mean()) * (1 - 1 / power)
    found = np.exp(_toward_mean(logs / power - errors, noise) + unit)
    rates = dict(zip(last, found.tolist(), strict=True))
    typical = float(np.median(found))
    # What was probed without any rise does not matter.
    without_rise = {group: 0.0 if probes else typical for group, probes in rises.items()}
    return {group: max(_LEAST_SENSITIVITY * typical, rates.get(group, without_rise[group])) for group in rises}


def _power(rises: Mapping[Group, Sequence[Rise]]) -> float:
    """Return the power of the error with which the loss rises, the same for all groups, by weighted least squares."""
    product, square = 0.0, 0.0
    for probes in rises.values():
        if len(probes) < 2 or min(probes[0].mean, probes[-1].mean) <= 0:
            continue
        weight = min(1.0, probes[0].mean / max(probes[0].deviation, 1e-300)) ** 2
        step = float(np.log(probes[-1].error / probes[0].error))
        product += weight * step * float(np.log(probes[-1].mean / probes[0].mean))
        square += weight * step**2
    return float(np.clip(product / square, 1.0, _LARGEST_POWER)) if square else 1.0


def _power_together(probes: Sequence[tuple[Rise, Rise]], together: float | None) -> float:
    """Return the power with which the rises of single groups, seen at larger errors, make up that of all together."""
    if together is None or together <= 0:
        return 1.0
    logs = np.log([large.credible for _, large in probes])
    shares = np.array([small.error / large.error for small, large in probes])
    powers = np.linspace(1.0, _LARGEST_POWER, 61)
    sums = powers * np.log((np.exp(logs / powers[:, None]) * shares).sum(1))
    return float(powers[np.abs(sums - np.log(together)).argmin()])


def _toward_mean(values: npt.NDArray[np.float64], noise: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return values drawn toward their mean by how noisy each is, against how much they differ beyond noise."""
    if len(values) < 2 or not noise.any():
        return values
    between = max(0.0, float(values.var(ddof=1) - np.square(noise).mean()))
    # Where nothing but noise is to be seen all are the same; else those count for the mean that are known best.
    weights = 1 / (np.square(noise) + max(between, 0.05))
    mean = float((weights * values).sum() / weights.sum())
    trust = between / np.maximum(between + np.square(noise), 1e-300)
    return np.asarray(mean + trust * (values - mean), dtype=np.float64)
