"""The variance of the mean of a table of seeds and images, as crossed random effects; knows nothing of claims or runs.

A table has a number for each seed and each image of a test set, as +1 where only the first of two networks is right.
Its entries are taken as mean + seed + image + rest, all random [Searle92, ch. 4.7]. The variance of their mean over S
seeds and N images is then var_seed / S + var_image / N + var_rest / (S N), which the mean squares of a two-way layout
without repetition estimate without bias: (MS_seeds + MS_images - MS_rest) / (S N). Its degrees of freedom are those of
[Satterthwaite46]. Two rules keep them honest with few seeds, and `tests` has the simulations:

- what images add is not below 0: an estimate below says that there is nothing to see, not that there is less than that;
- for the degrees of freedom, seeds count by at least what the rest alone would make of them, and there are never fewer
  than S - 1. Without the first, seeds that agree by chance look well known, and a bound at 95 % errs in 6.2 %.

F1 and Matthews' correlation are no means over images. What they vary by is resampled [Efron93, ch. 8]: images are drawn
again, the same for all seeds and for both networks, which gives the covariance of the numbers of two seeds (what images
add) and their variance. Seeds are resampled in closed form: of S values the bootstrap of the mean has the variance
(S - 1) / S times theirs over S, and what is missing is put back, as three seeds have no more than ten resamples.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hap.harness.records.outcomes import shares

DRAWS = 2000  # test sets that are drawn again, for F1 and Matthews' correlation

Truths = Bool[np.ndarray, "seeds images"]


class Parts(NamedTuple):
    """What the variance of a mean over seeds and images is made of, in squared units of the number."""

    seeds: float  # the variance from seed to seed on these images, MS_seeds / N: what seeds add, and the rest
    images: float  # what images add to the variance of the mean, which no number of seeds makes less; not below 0
    rest: float  # what is of neither alone, over N: MS_rest / N
    size: int  # N

    def error(self, seeds: int) -> float:
        """The standard error of the mean over so many seeds, of which each is as those seen."""
        return float(np.sqrt(self.seeds / seeds + self.images))

    def freedom(self, seeds: int) -> float:
        """Its degrees of freedom, as the module's text has them."""
        among, rest = max(self.seeds, self.rest) / seeds, self.rest / seeds
        noise = among**2 / (seeds - 1) + (self.images + rest) ** 2 / (self.size - 1)
        noise += rest**2 / ((seeds - 1) * (self.size - 1))
        return max(seeds - 1.0, (among + self.images) ** 2 / noise) if noise else seeds - 1.0


def parts(table: Float[np.ndarray, "seeds images"]) -> Parts:
    """Those of the mean of a table of at least two seeds and two images."""
    seeds, size = table.shape
    mean, by_seed, by_image = table.mean(), table.mean(1), table.mean(0)
    of_seeds = size * ((by_seed - mean) ** 2).sum() / (seeds - 1)
    of_images = seeds * ((by_image - mean) ** 2).sum() / (size - 1)
    rest = table - by_seed[:, None] - by_image[None, :] + mean
    of_rest = (rest**2).sum() / ((seeds - 1) * (size - 1))
    added = max(0.0, of_images - of_rest) / (seeds * size)
    return Parts(float(of_seeds / size), float(added), float(of_rest / size), size)


def resampled(metric: str, labels: Bool[np.ndarray, "images"], said: Truths, other: Truths | None = None) -> Parts:
    """Those of the mean over seeds of "f1" or "matthews", or of its difference from `other`'s; as shares.

    `labels`: of each sample, whether it is of class 1; `said`: what the network of each seed said of it.
    """
    count, size = said.shape
    weights = _drawn(size)
    found = shares(metric, labels, said)
    drawn = shares(metric, labels, said, weights)
    if other is not None:
        found, drawn = found - shares(metric, labels, other), drawn - shares(metric, labels, other, weights)
    covariance = np.atleast_2d(np.cov(drawn, rowvar=False))
    own = float(np.trace(covariance) / count)
    shared = float((covariance.sum() - np.trace(covariance)) / (count * (count - 1)))
    return Parts(float(found.var(ddof=1)), max(0.0, shared), max(0.0, own - shared), size)


@lru_cache(maxsize=8)  # many claims are about one test set
def _drawn(size: int) -> Float[np.ndarray, "draws images"]:
    """How often each sample is in each of the test sets that are drawn again."""
    rng = np.random.default_rng(0)  # the same records have the same bounds
    return rng.multinomial(size, np.full(size, 1 / size), DRAWS).astype(float)
