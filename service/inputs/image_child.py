"""An image child: decodes what strangers sent, with memory bounded by the kernel and time by its parent's patience.

It knows nothing of the server. Invariant: whatever an image does to the decoder, the worst is the end of this process.
"""

from __future__ import annotations

from service.inputs.child_memory import limit_memory
from service.inputs.image_messages import Ready, Request, Warm
from service.inputs.images import prepare
from service.processes import ChannelClosed, ChildChannel


def main() -> None:
    """Answer until the parent is gone."""
    channel = ChildChannel.open(Request)
    try:
        while True:
            message = channel.receive()
            if isinstance(message, Warm):
                limit_memory(message.memory_bytes)
                channel.send(Ready())
            else:
                channel.send(prepare(message))
    except ChannelClosed:
        return


if __name__ == "__main__":
    main()
