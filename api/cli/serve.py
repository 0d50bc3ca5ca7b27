"""`galaxyline serve`: the server's command line."""

import os
from typing import Any

import click
import uvloop

from api.cli.options import num_scheduler_steps, options_of, override_tt_config
from api.server.serve import serve
from api.settings.environment import note_environment
from api.settings.model import ModelOptions
from api.settings.option import made, take
from api.settings.server import KEY_VARIABLES, KeyOptions, ServeSettings, TlsFiles, TlsOptions


@click.command("serve")
@click.argument("model_argument", metavar="[MODEL]", required=False)
@options_of(ModelOptions)
@options_of(ServeSettings)
@options_of(KeyOptions)
@options_of(TlsOptions)
@override_tt_config
@num_scheduler_steps
def serve_command(model_argument: str | None, trace_mode: bool, **given: Any) -> None:
    """Serve MODEL, a directory or a hub id, over HTTP; without one, the sample model."""
    source = take(ModelOptions, given).source(model_argument, given["device"], os.environ)
    keys, files = take(KeyOptions, given), take(TlsOptions, given)
    api_keys = keys.read(os.environ)
    for name in KEY_VARIABLES:
        # The engine and the stages have no use for it.
        os.environ.pop(name, None)
    tls = TlsFiles.of(files.ssl_certfile, files.ssl_keyfile, files.ssl_ca_certs)
    given["enable_trace"] |= trace_mode
    note_environment(os.environ)
    settings = made(ServeSettings, {**given, "source": source, "api_keys": api_keys, "tls": tls})
    uvloop.run(serve(settings))
