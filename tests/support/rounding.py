"""How far float32 may be off when a matrix library takes its sums in another order: a bound from arithmetic alone."""

from __future__ import annotations

import math

from hrmcore.config import HRMConfig

UNIT = 2.0**-24  # half of float32's eps: the largest relative error of one operation
PRODUCTS = 4  # of a block: gqkv, o, gate_up and down


def reordering(config: HRMConfig) -> float:
    """The largest difference to expect between logits, relative to the largest, of two ways to compute one model.

    A product's sum has at most n = max(D, A, F) terms, so one order of it rounds n times, and two orders 2n times. Each
    rounding is at most UNIT of the sum, and their signs are as good as random: the errors add as squares (Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019). So do those of all the products that a token passes through, for the norms
    keep the residual stream's size. That is UNIT·sqrt(2·n·products). Terms that are exactly 0 count, because they move
    the others to other places of the order. A wrong scale or a misplaced entry is off by 1e-2 and more.
    """
    terms = max(config.hidden_size, config.attention_width, config.intermediate_size)
    l_depth, h_depth = config.depths
    blocks = config.H_cycles * (config.L_cycles * l_depth + h_depth)
    return UNIT * math.sqrt(2 * terms * PRODUCTS * blocks)
