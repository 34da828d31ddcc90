"""A frozen quantized base that lies in CPU memory or on a disk, and comes to the device block by
block while it computes, whatever its vendor.

The tensors of a decoder block's vendor modules are one row of bytes (see `model.flat`), in
page-locked memory or in a file (`rows`). The device has two slots: one for the block that computes,
and one into which the next is copied meanwhile, on a stream of its own. A block comes when somebody
reads one of its layers, in whatever order: forward, backward, a recomputation, an evaluation. Which
block comes next is seen in the pass before, so what is guessed wrong costs time and nothing else. A
block's tensors are views of its slot for as long as it has one, and of its row otherwise: what they
hold is right at any time.
"""

from .models import Which, bring_back, stream, stream_block, streamer_of
from .rows import OnDisk
from .streamer import Streamer
from .target import StreamedTarget
from .traffic import Traffic

__all__ = [
    "OnDisk",
    "StreamedTarget",
    "Streamer",
    "Traffic",
    "Which",
    "bring_back",
    "stream",
    "stream_block",
    "streamer_of",
]
