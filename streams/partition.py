"""A part of a card's multiprocessors for one stream: CUDA green contexts.

    132 multiprocessors    [ inference: all of them                              ]
    share 0.25                                              [ training: 32       ]

Kernels on the stream of a partition run on its multiprocessors alone; streams outside it keep the
whole card, its part included. So a share given to training is a ceiling on what it can take from
inference, not a wall around it. torch marks the interface as beta.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

GRANULE = 8
"""Multiprocessors are dealt out in multiples of this (compute capability 9; fewer before)."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A stream on some of a card's multiprocessors.

    Attributes:
        stream: a `torch.cuda.Stream`.
        multiprocessors: how many it may use.
        context: keeps the green context alive for as long as the stream is used.
    """

    stream: Any
    multiprocessors: int
    context: Any


def multiprocessors_for(share: float, total: int) -> int:
    """How many of `total` multiprocessors a share is: a multiple of `GRANULE`, at least one.

    Raises:
        ValueError: the share is not between 0 and 1, or the card is too small to be divided.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"lanes.sm_share is {share}; use a share above 0 and below 1, or leave it unset for "
            "the whole card"
        )
    granules = total // GRANULE
    if granules < 2:
        raise ValueError(
            f"the card has {total} multiprocessors, which are dealt out by {GRANULE}: too few to "
            "divide; leave lanes.sm_share unset"
        )
    return GRANULE * min(max(round(share * total / GRANULE), 1), granules - 1)


def open_partition(device: torch.device, share: float) -> Partition | None:
    """A stream on a share of the multiprocessors of a CUDA device.

    Returns: None where torch or the driver cannot divide the card; the reason is logged.

    Raises:
        ValueError: see `multiprocessors_for`.
    """
    total = torch.cuda.get_device_properties(device).multi_processor_count
    count = multiprocessors_for(share, total)
    try:
        from torch.cuda.green_contexts import GreenContext

        context: Any = GreenContext.create(num_sms=count, device_id=device.index or 0)
        stream = context.Stream()
    except (ImportError, AttributeError, TypeError, RuntimeError) as reason:
        log.warning(
            "lanes.sm_share is ignored, the training lane may use all of %s: %s", device, reason
        )
        return None
    log.info("the training lane runs on %d of %d multiprocessors", count, total)
    return Partition(stream, count, context)
