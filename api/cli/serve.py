"""`galaxyline serve`: the server's command line."""

import os
from typing import Any

import click

from api.cli.options import ConfigCommand, config_file, log_level, options_of, override_tt_config, vain_options
from api.settings.environment import note_environment
from api.settings.model import ModelOptions
from api.settings.option import made, take
from api.settings.server import KEY_VARIABLES, KeyOptions, ServeSettings, TlsFiles, TlsOptions


@click.command("serve", cls=ConfigCommand)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@options_of(ModelOptions)
@options_of(ServeSettings)
@options_of(KeyOptions)
@options_of(TlsOptions)
@override_tt_config
@config_file
@log_level
@vain_options
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
    # Imports of half a second, which --help and options that are refused do without.
    import uvloop  # noqa: PLC0415

    from api.server.serve import serve  # noqa: PLC0415

    uvloop.run(serve(settings))
