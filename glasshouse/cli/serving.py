"""The verb that serves: `serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.app import app
from glasshouse.cli.edited import EDITS
from glasshouse.cli.questions import KNOB, PANEL, SEED, SIZE, SUBJECT
from glasshouse.errors import BadValue, GlasshouseError

if TYPE_CHECKING:
    import socket


@app.command(rich_help_panel=PANEL, short_help="Answer OpenAI-style requests over HTTP, edits in force.")
def serve(
    subject: Annotated[str, SUBJECT],
    edits: Annotated[Path | None, EDITS] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="FOLDER", help="A PEFT adapter on top of the model.")] = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen. The default is reached from this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one; the address is printed on stderr.")] = 8000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Most requests decoded together.")] = 64,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; default: float32 on the CPU, else the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, auto; default: cuda where there is one.")] = None,
    size: Annotated[str, SIZE] = "mini",
    seed: Annotated[int, SEED] = 0,
    knob: Annotated[list[str] | None, KNOB] = None,
) -> None:
    """Answer OpenAI-style requests over HTTP: /v1/chat/completions and /v1/completions (also as a stream), /v1/models, /healthz.

    Requests that arrive together are decoded together. The temperature is 0 unless a request gives one; a request's seed gives the draws
    that `glasshouse chat --seed` gives. There are no accounts: with --host, whoever reaches the port can ask. Ctrl-C ends it (code 130).
    """
    listening = bind(host, port)
    try:
        import uvicorn

        from glasshouse.serving.http import make_app
    except ModuleNotFoundError as error:
        raise GlasshouseError(f"`glasshouse serve` needs {error.name}; install it with: pip install 'glasshouse[web]'") from error
    from glasshouse.serving import Batcher, open_model, read_edit_set

    model = open_model(subject, size=size, seed=seed, knobs=knob or [], device=device, dtype=dtype, adapter=adapter)
    with Batcher(model, read_edit_set(edits, model), batch_size=batch_size, seed=seed) as batcher:
        listening.listen(128)
        names = list(dict.fromkeys([model.name, subject]))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        in_force = f", {len(batcher.edits)} edit{'s' if len(batcher.edits) > 1 else ''} in force" if batcher.edits else ""
        print(f"Serving {model.name} at {address}/v1{in_force}. Ctrl-C ends it.", file=sys.stderr, flush=True)
        settings = uvicorn.Config(make_app(batcher, names), log_level="warning", timeout_graceful_shutdown=2)
        try:
            uvicorn.Server(settings).run(sockets=[listening])
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            raise typer.Exit(130) from None


def bind(host: str, port: int) -> socket.socket:
    """A socket bound there, so that a port in use is told before a model is loaded. Raises `BadValue`."""
    import socket

    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadValue(f"The server cannot listen on {host}:{port}: {reason}. Give another --port (0 takes a free one) or --host.") from error
    return found
