"""`restore models`: the known checkpoints."""

from __future__ import annotations

from pathlib import Path

import typer

from restore.app.options import Layers, ModelOption, Offline, parse_model_options

app = typer.Typer(no_args_is_help=True, help="Known checkpoints: list, show, pull, import, forget, layers.")


@app.command("list")
def models_list() -> None:
    """List all known checkpoints and whether they are on this machine."""
    from restore import zoo

    typer.echo("\n".join(zoo.list_models()))


@app.command("show")
def models_show(name: str) -> None:
    """Show source, licence, size and checksum of a checkpoint."""
    from restore import zoo

    typer.echo(zoo.describe_model(name))


@app.command("pull")
def models_pull(name: str, offline: Offline = False) -> None:
    """Download a checkpoint into the cache, resuming an interrupted download."""
    from restore import zoo

    typer.echo(f"{name} is at {zoo.pull(name, offline=offline or None)}")


@app.command("import")
def models_import(name: str, file: Path) -> None:
    """Verify a checkpoint fetched by hand and copy it into the cache."""
    from restore import zoo

    typer.echo(f"{name} is at {zoo.import_file(name, file)}")


@app.command("forget")
def models_forget(name: str) -> None:
    """Remove the recorded checksum or commit of a checkpoint, so that another one is accepted."""
    from restore import zoo

    zoo.forget_checksum(name)
    typer.echo(f"what was recorded of {name} is forgotten")


@app.command("layers")
def models_layers(name: str, layers: Layers = None, model_option: ModelOption = None, offline: Offline = False) -> None:
    """List the self-attention layers and heads of a backbone under all their names, or those that --layers selects."""
    from restore import restorer

    loaded = restorer.load(name, device="cpu", offline=offline, **parse_model_options(model_option))
    typer.echo("\n".join(loaded.layer_table(layers)))
