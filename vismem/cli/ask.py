"""The commands that ask a model, and that serve one to be asked."""

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vismem.cli.options import enter, load
from vismem.cli.parser import Commands

SERVED = ("base", "device", "dtype", "port", "max_patches", "cache_mb")


def add_commands(commands: Commands) -> None:
    """Ask in this process, ask a server, and serve."""
    command = commands.group("Ask")
    command("try", _run_try, "answer 20 example images with and without memory", options=False)

    add = command("ask", _run_ask, "ask a model about images, without a server", options=False)
    _add_question(add)
    add("--model", help="folder, hub id or models:/NAME@champion; default: the tiny VLM that comes with VisMem")
    add("--base", metavar="MODEL", help="hub id or folder of the model's base, where it is not as the model says")
    _add_dtype(add)

    add = command("infer", _run_infer, "ask the served model about images")
    _add_question(add)
    add("--timeout", type=float, default=60.0, metavar="S", help="deadline of the whole answer (default: 60)")
    about = "any server; grpcs:// with TLS, http:// for `vismem api`; default: this machine at deploy.grpc_port"
    add("--url", metavar="HOST:PORT", help=about)
    add("--model", metavar="NAME", help="the served model's name; default: the one that the server has")

    add = command("serve", _run_serve, "serve the champion with Triton until Ctrl-C", outputs=True)
    about = "model repository; default: the champion's, before there is one artifacts/deploy/model_repository"
    add("--repository", type=Path, metavar="FOLDER", help=about)
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", "--grpc-port", type=int, help="gRPC port; default: deploy.grpc_port, 0: any free one")
    add("--http-port", type=int, help="HTTP port; default: deploy.http_port")
    add("--metrics-port", type=int, help="Prometheus port; default: deploy.metrics_port")
    _add_tls(add)
    _add_request_log(add)

    about = "serve a model over HTTP as OpenAI's API does, every family, until Ctrl-C"
    add = command("api", _run_api, about, options=False)
    _add_served(add, port=8080)
    add("--name", default="vismem", help="what clients call the model (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--rows", type=int, default=8, metavar="N", help="answers decoded together (default: %(default)s)")
    _add_tls(add)
    _add_request_log(add)

    about = "a page in the browser that asks a model, beside its answer without memory, until Ctrl-C"
    add = command("playground", _run_playground, about, options=False)
    _add_served(add, port=7860)


def _add_served(add: Callable[..., Any], port: int) -> None:
    """The model that is served in this process, and what its questions may take (`SERVED`)."""
    add("--model", help="folder, hub id or models:/NAME@champion; default: the tiny VLM that comes with VisMem")
    add("--base", metavar="MODEL", help="hub id or folder of the model's base, where it is not as the model says")
    add("--device", help="cpu, cuda or cuda:1; default: the first GPU where there is one")
    _add_dtype(add)
    add("--port", type=int, default=port, help="0: any free one (default: %(default)s)")
    # 16,384 patches are 3.2 megapixels as Qwen2.5-VL cuts them.
    add("--max-patches", type=int, default=16_384, metavar="N", help="and tokens, of a question (default: %(default)s)")
    add("--cache-mb", type=int, default=1_000, metavar="N", help="kept of images and prompts (default: %(default)s)")


def _add_dtype(add: Callable[..., Any]) -> None:
    add("--dtype", choices=("float32", "bfloat16"), help="weights' type; default: the one that the model was saved in")


def _add_tls(add: Callable[..., Any]) -> None:
    add("--tls-certificate", type=Path, metavar="FILE", dest="certificate", help="PEM; with --tls-key")
    add("--tls-key", type=Path, metavar="FILE", dest="key", help="PEM")


def _add_request_log(add: Callable[..., Any]) -> None:
    """What `vismem drift` reads."""
    about = "write a sample of the requests with their answers there, for `vismem drift`; default: none"
    add("--request-log", type=Path, metavar="FOLDER", help=about)
    add("--request-share", type=float, default=0.05, metavar="S", help="of the requests (default: %(default)s)")
    add("--request-log-mb", type=int, default=1_000, metavar="N", help="then the oldest go (default: %(default)s)")
    add("--request-images", action="store_true", help="keep the images too")


def _set_request_log(arguments: argparse.Namespace) -> None:
    """Whoever answers, perhaps a server's process, takes it from the environment."""
    from vismem.serving.request_log import FOLDER, IMAGES, MEGABYTES, SHARE

    if arguments.request_log:
        os.environ |= {FOLDER: str(arguments.request_log.absolute()), SHARE: str(arguments.request_share)}
        os.environ |= {MEGABYTES: str(arguments.request_log_mb), IMAGES: str(int(arguments.request_images))}


def _add_question(add: Callable[..., Any]) -> None:
    """The question and how it is to be answered: the same for every command that asks."""
    add("question", nargs="?", help="what to ask; or give it with --prompt")
    add("--prompt", metavar="QUESTION", help="what to ask")
    add("--image", action="append", required=True, metavar="FILE", help="image file; may be repeated")
    add("--stream", action="store_true", help="print the answer while it is decoded")
    about = "kinds of memory that the model may call: learned (both), off, short or long (default: %(default)s)"
    add("--memory", choices=("learned", "off", "short", "long"), default="learned", help=about)
    add("--no-memory", action="store_const", const="off", dest="memory", help="the same as --memory off")
    about = "longest answer in tokens; default: as in its evaluation or, before `export`, its training; else 120"
    add("--max-new-tokens", type=int, metavar="N", help=about)
    add("--temperature", type=float, default=0.0, metavar="T", help="0: the most probable answer (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")


def _question(arguments: argparse.Namespace) -> str:
    if (arguments.question is None) == (arguments.prompt is None):
        arguments.parser.error("give one question, at the end or with --prompt")
    return str(arguments.question if arguments.prompt is None else arguments.prompt)


def _answering(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `_add_question` by the names that the library has for them."""
    names = ("stream", "memory", "max_new_tokens", "temperature", "seed")
    return {name: getattr(arguments, name) for name in names}


def _run_try(arguments: argparse.Namespace) -> None:
    from vismem.ask import try_examples
    from vismem.summary import make_console

    try_examples(make_console(), shlex.join(arguments.caller.program()))


def _run_ask(arguments: argparse.Namespace) -> None:
    question = _question(arguments)
    from vismem.ask import DEFAULT_MODEL, ask

    model = arguments.model or DEFAULT_MODEL
    named = {"model": model, "base": arguments.base, "dtype": arguments.dtype}
    ask(arguments.image, question, **named, **_answering(arguments))


def _run_infer(arguments: argparse.Namespace) -> None:
    question = _question(arguments)
    from vismem.serving.client import main_infer

    url = arguments.url or f"127.0.0.1:{load(arguments).deploy.grpc_port}"
    main_infer(
        arguments.image,
        question,
        url=url,
        model=arguments.model,
        timeout=arguments.timeout,
        **_answering(arguments),
    )


def _run_serve(arguments: argparse.Namespace) -> None:
    _set_request_log(arguments)
    files = (arguments.repository, arguments.certificate, arguments.key)
    named, certificate, key = (file.absolute() if file else None for file in files)
    config, artifacts = enter(arguments)
    from vismem.serving.champion import follower
    from vismem.serving.supervise import serve

    champion = follower(config, artifacts)
    serve(
        config,
        named or champion(),
        champion=None if named else champion,
        host=arguments.host,
        grpc_port=arguments.port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
        certificate=certificate,
        key=key,
        write=lambda line: print(arguments.caller.shown(line), flush=True),
    )


def _run_api(arguments: argparse.Namespace) -> None:
    _set_request_log(arguments)
    _serve_api(arguments, *SERVED, "name", "host", "rows", "certificate", "key")


def _run_playground(arguments: argparse.Namespace) -> None:
    _serve_api(arguments, *SERVED, page=True)


def _serve_api(arguments: argparse.Namespace, *names: str, page: bool = False) -> None:
    from vismem.api import serve_api
    from vismem.ask import DEFAULT_MODEL

    options = {name: getattr(arguments, name) for name in names}
    serve_api(arguments.model or DEFAULT_MODEL, **options, page=page, write=lambda line: print(line, flush=True))
