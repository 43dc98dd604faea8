"""Rules that make one update out of N: the weighted mean, and what holds when some of the N lie.

Every rule takes updates [N, D] (differences to what the clients were sent) and the clients' sample counts [N], and
gives one update [D] in float64. They know nothing of subspaces: a strategy applies its rule to each subspace's group.
`suspects` is the number of updates that may be hostile.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Rule = Callable[[Matrix, Matrix, int], Matrix]
STEPS, SMOOTH = 100, 1e-6  # Weiszfeld's iterations and the distance, in median norms, below which two points are one


def mean(updates: Matrix, counts: Matrix, suspects: int = 0) -> Matrix:
    """Σ n_k x_k / Σ n_k (McMahan et al. 2017, arXiv 1602.05629); one hostile update moves it anywhere."""
    return np.asarray(counts @ updates / counts.sum())


def median(updates: Matrix, counts: Matrix, suspects: int = 0) -> Matrix:
    """The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498), every client with one voice."""
    return np.asarray(np.median(updates, axis=0))


def trimmed(updates: Matrix, counts: Matrix, suspects: int) -> Matrix:
    """Per coordinate the mean without the `suspects` largest and smallest values (Yin et al. 2018)."""
    cut = min(suspects, (len(updates) - 1) // 2)
    return np.asarray(np.sort(updates, axis=0)[cut : len(updates) - cut].mean(axis=0))


def multikrum(updates: Matrix, counts: Matrix, suspects: int) -> Matrix:
    """The weighted mean of the N − f updates nearest to their N − f − 2 nearest (Blanchard et al. 2017).

    The proof wants N ≥ 2f + 3; with fewer updates f is lowered to what N allows.
    """
    number = len(updates)
    hostile = max(0, min(suspects, (number - 3) // 2))
    near = number - hostile - 2
    if near < 1:
        return mean(updates, counts)
    far = np.sort(_distances(updates), axis=1)[:, 1 : near + 1]  # 0 is the distance to itself
    chosen = np.sort(np.argsort(far.sum(axis=1), kind="stable")[: number - hostile])
    return mean(updates[chosen], counts[chosen])


def geomedian(updates: Matrix, counts: Matrix, suspects: int = 0) -> Matrix:
    """The weighted geometric median by smoothed Weiszfeld steps (Pillutla et al. 2019, arXiv 1912.13445).

    It is a mean with weights that are sought, so the steps need only the products of the updates, [N, N]. How finely
    they end is a matter of the median norm: a hostile update may be as long as it likes.
    """
    around = updates - median(updates, counts)  # else honest distances drown beside a hostile one's square
    gram, share = around @ around.T, counts / counts.sum()
    floor = max(SMOOTH * float(np.median(np.sqrt((updates**2).sum(axis=1)))), 1e-30)
    for _ in range(STEPS):
        reach = gram @ share
        far = np.sqrt(np.maximum(np.diag(gram) - 2 * reach + share @ reach, 0.0))
        raised = counts / np.maximum(far, floor)
        moved = raised / raised.sum() - share
        share = share + moved
        if moved @ gram @ moved <= floor**2:
            break
    return np.asarray(share @ updates)


RULES: Mapping[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed": trimmed,
    "multikrum": multikrum,
    "geomedian": geomedian,
}


def _distances(updates: Matrix) -> Matrix:
    """Squared distances [N, N]."""
    gram = updates @ updates.T
    square = np.diag(gram)
    return np.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0)
