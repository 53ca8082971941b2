"""How even the load of experts can be at all: what chance leaves, and what the commonest token forces.

T tokens go to k of E experts each: an even share is T k / E, and a deviation is a count over an even share, less 1.
"""

import math
from statistics import NormalDist


def cv_floor(num_experts: int, tokens: float, top_k: float) -> float:
    """sqrt(E / (T k) * (1 - k / E)): the coefficient of variation of counts where every choice of k is as likely.

    A count is then binomial, of T tokens with probability k / E.
    """
    return math.sqrt(max(0.0, num_experts / top_k - 1) / tokens)


def most_floor(num_experts: int, tokens: float, top_k: float) -> float:
    """The busiest expert's expected deviation where every choice of k is as likely.

    Of E normal deviates the largest is about z = Phi^-1((E - 3/8) / (E + 1/4)) (Blom 1958), and a binomial's skewness s
    makes z + (z^2 - 1) s / 6 of it (Cornish and Fisher 1938): +57 % at T = 2048, E = 96, k = 1, where normal deviates
    alone would say +53 %.
    """
    E, q = num_experts, top_k / num_experts
    if q >= 1:
        return 0.0
    z = NormalDist().inv_cdf((E - 0.375) / (E + 0.25))
    skewness = (1 - 2 * q) / math.sqrt(tokens * q * (1 - q))
    return cv_floor(E, tokens, top_k) * (z + (z * z - 1) * skewness / 6)


def most_bound(num_experts: int, top_k: float, commonest: float) -> float:
    """E * pi / k - 1, the least that the busiest expert's deviation can be where a token's choice depends on it alone.

    All copies of the commonest token, a share pi of all, then go to the same k experts.  A lower layer sees little more
    than the token; one that sees its context may stay below.  At or below 0 it bounds nothing.
    """
    return num_experts * commonest / top_k - 1
