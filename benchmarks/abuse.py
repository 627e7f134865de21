"""Whether a server survives its clients: eight ask at a time, for minutes, and half of them are killed at random.

    OMP_WAIT_POLICY=passive python benchmarks/abuse.py [--server triton|api] [--seconds 300] [--json FILE]

The memory that comes with VisMem is served in processes of its own, by Triton or by `vismem api`. Every answer, whole
or streamed, is compared with the one that its question has when nobody else asks. None may fail or be another's, and
the server's memory must not grow.
"""

import base64
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from common import MEMORY, parser, publish, questions, table

from vismem import Client
from vismem.serving.deploy import api_server

CLIENTS, MORTAL, QUESTIONS = 8, 4, 24
LIMIT = 40  # tokens
Asked = dict[str, tuple[list[str], str, dict[str, Any]]]
CLIENT = """
import base64, json, random, sys
from vismem import Client
asked, address, seed = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
client, rng = Client(address, timeout=120), random.Random(seed)
while True:
    name = rng.choice(sorted(asked))
    images, question, options = asked[name]
    files = [base64.b64decode(image) for image in images]
    try:
        if rng.random() < 0.5:
            said = client.ask(files, question, **options).marked
        else:
            said = "".join(piece.marked for piece in client.stream(files, question, **options)).strip()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]), flush=True)
"""


@contextmanager
def served(kind: str, folder: Path, name: str = "vismem") -> Iterator[tuple[str, int]]:
    """A server's address, and the process that it is or that began it."""
    if kind == "api":
        with api_server(MEMORY, "vismem", "float32", folder / "log") as (address, service):
            yield address, service.process.pid
        return
    from serving import triton

    with triton(name) as server:
        yield f"grpc://{server.grpc_url}", server.service.process.pid


def questions_asked() -> Asked:
    """Images as base64, a question and options, by name: every kind of memory and none, greedy and drawn."""
    asked = {}
    for number, sample in enumerate(questions(QUESTIONS)):
        images = [base64.b64encode(image).decode() for image in sample.images]
        options: dict[str, Any] = {"max_new_tokens": LIMIT, "memory": ("learned", "off", "short", "long")[number % 4]}
        if number % 3 == 0:
            options |= {"temperature": 1.0, "seed": number}
        asked[sample.id] = images, sample.question, options
    return asked


def answers_alone(client: Client, asked: Asked) -> dict[str, str]:
    """What each question is answered when nobody else asks."""
    return {
        name: client.ask([base64.b64decode(image) for image in images], question, **options).marked
        for name, (images, question, options) in asked.items()
    }


def megabytes(process: psutil.Process) -> float:
    """Of a process and what it started."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def start(file: Path, address: str, number: int, seed: int) -> "subprocess.Popen[bytes]":
    """A client that asks until it is killed; its answers are added to a file."""
    with (file.parent / f"{number}.jsonl").open("ab") as answers:
        return subprocess.Popen([sys.executable, "-c", CLIENT, str(file), address, str(seed)], stdout=answers)


def main() -> None:
    """Serve, ask, kill, compare."""
    arguments = parser(__doc__, seconds=(300, "of abuse"))
    arguments.add_argument("--server", choices=("triton", "api"), default="triton")
    args, rng = arguments.parse_args(), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch, served(args.server, Path(scratch)) as (address, pid):
        folder = Path(scratch) / "clients"
        folder.mkdir()
        file, server, asked = folder / "asked.json", psutil.Process(pid), questions_asked()
        file.write_text(json.dumps(asked))
        alone = Client(address, timeout=120)
        expected = answers_alone(alone, asked)
        clients = [start(file, address, number, number) for number in range(CLIENTS)]
        try:
            memory, killed, began = [megabytes(server)], 0, time.monotonic()
            while (passed := time.monotonic() - began) < args.seconds:
                time.sleep(rng.uniform(0.5, 1.5))
                number = rng.randrange(MORTAL)
                clients[number].kill()
                clients[number].wait()
                killed += 1
                clients[number] = start(file, address, number, CLIENTS + killed)
                if passed >= 5 * len(memory):
                    memory.append(megabytes(server))
        finally:
            for client in clients:
                client.kill()
                client.wait()
        again = answers_alone(alone, asked)
        answers = [json.loads(line) for each in folder.glob("*.jsonl") for line in each.read_text().splitlines()]
    wrong = [(name, said) for name, said in answers if said != expected[name]]
    failed = [said for _, said in wrong if said not in expected.values()]
    quarter = len(memory) // 4 or 1
    figures = {
        "server": args.server,
        "seconds": args.seconds,
        "answers": len(answers),
        "clients_killed": killed,
        "failed": len(failed),
        "mixed_up": len(wrong) - len(failed),
        "same_afterwards": again == expected,
        "first_failure": failed[0] if failed else None,
        "memory_mb": [round(value) for value in memory],
        "growth": sum(memory[-quarter:]) / sum(memory[quarter : 2 * quarter] or memory[:1]),
    }
    row = "{server} | {answers} | {clients_killed} | {failed} | {mixed_up} | {growth:.3f}".format(**figures)
    head = "server | answers | clients killed | failed | mixed up | memory, last quarter over second"
    publish(figures, table(head, [row]), args.json)


if __name__ == "__main__":
    main()
