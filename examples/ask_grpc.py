"""Asks `vismem serve` with plain tritonclient: python examples/ask_grpc.py IMAGE QUESTION MODEL [HOST:PORT].

Prints the answer as it is decoded, with ⟨short⟩ and ⟨long⟩ where memories were invoked. The protocol is in
deploy/triton/README.md.
"""

import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton


def main(image: str, question: str, model: str = "vismem", url: str = "127.0.0.1:8001") -> None:
    """Ask once."""
    inputs = []
    for name, value in (("IMAGE", Path(image).read_bytes()), ("PROMPT", question.encode()), ("MEMORY", b"learned")):
        inputs.append(triton.InferInput(name, [1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([value], dtype=object))
    replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = triton.InferenceServerClient(url)
    client.start_stream(callback=lambda result, error: replies.put((result, error)))
    client.async_stream_infer(model, inputs)
    event = ""
    while event != "end":
        result, error = replies.get(timeout=60)
        if error:
            raise error
        text, event = (result.as_numpy(name)[0].decode() for name in ("TEXT", "EVENT"))
        print(f"⟨{event}⟩" if event in ("short", "long") else text, end="", flush=True)
    print()
    client.stop_stream()  # waits for the server's end of it; to give up an answer: stop_stream(cancel_requests=True)
    client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
