"""``device_query``: which GPUs there are."""

from __future__ import annotations

import torch

from soonest.caffe.log import Say


def query(wanted: str, *, say: Say) -> None:
    """Says what is known of GPUs.

    Args:
        wanted: their numbers, with commas between them, or ``all``.
        say: what log lines go to.

    Raises:
        ValueError: there is no such GPU.
    """
    say(f"Querying GPUs {wanted}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [str(number) for number in range(count)] if wanted == "all" else wanted.split(",")
    for number in numbers if wanted else []:
        if not number.strip().isdecimal() or int(number) >= count:
            raise ValueError(f"there is no GPU {number}: this machine has {count}")
        one = torch.cuda.get_device_properties(int(number))
        say(f"Device id:                     {int(number)}")
        say(f"Major revision number:         {one.major}")
        say(f"Minor revision number:         {one.minor}")
        say(f"Name:                          {one.name}")
        say(f"Total global memory:           {one.total_memory}")
        say(f"Number of multiprocessors:     {one.multi_processor_count}")
