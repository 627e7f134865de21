"""Asks `vismem api` with the openai package: python examples/ask_http.py IMAGE QUESTION [URL].

Prints the answer as it is decoded, with ⟨short⟩ and ⟨long⟩ where memories were invoked.
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI


def main(image: str, question: str, url: str = "http://127.0.0.1:8080/v1") -> None:
    """Ask once."""
    client = OpenAI(base_url=url, api_key="none")  # or the server's VISMEM_API_TOKEN
    data = base64.b64encode(Path(image).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        stream=True,
        extra_body={"vismem": {"memory": "learned"}},  # or off, short, long
    )
    for event in stream:
        (choice,) = event.choices
        memory = (choice.model_extra or {}).get("vismem", {}).get("memory")
        print(f"⟨{memory}⟩" if memory else choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
