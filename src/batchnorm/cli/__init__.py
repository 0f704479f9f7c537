"""The command: parse, call, print. What a command needs is imported in it: not for --help."""

import sys

try:
    import typer

    from batchnorm.cli import comparison, deployment, doctor, speed, studies
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"batchnorm: the command needs {missing.name}. Install it: pip install 'batchnorm[lab]'"
    ) from missing

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization in PyTorch: train with and without, and see the difference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _command in (
    comparison.compare,
    comparison.report,
    deployment.fold,
    deployment.recalibrate,
    deployment.summary,
    doctor.check,
):
    app.command()(_command)
# options behind the script's name are the script's
app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(
    doctor.watch
)
app.command()(speed.bench)
app.add_typer(studies.study, name="study")


def main() -> None:
    """Run the command."""
    # package.module:function may stand in the current folder, and not in the command's own
    sys.path[: 0 if sys.flags.safe_path else 1] = [""]
    try:
        app()
    except KeyboardInterrupt:  # before or behind a command's own handling: torch takes a second
        raise SystemExit(130) from None
