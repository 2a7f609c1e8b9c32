"""The ``dibit`` command: its commands, and how mistakes end. What a command takes is in ``commands/arguments``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from deployments.commands import keys
from deployments.commands.arguments import chat, env, generate, inspect, plan, quantize, serve

app = typer.Typer(
    name="dibit",
    help="Serve 2-bit mixture-of-experts models: over HTTP, in a chat, or offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("chat", epilog=chat.EXAMPLES)(chat.chat)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("quantize", epilog=quantize.EXAMPLES)(quantize.quantize)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect_model)
app.command("env")(env.show_environment)
app.command("plan", epilog=plan.EXAMPLES)(plan.make_plan)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user got wrong is one line on standard error and exit code 1, never a traceback.

    Args:
        arguments: of the command line, without the program's name; those of this process by default.
    """
    try:
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from engine.errors import DibitError

        if not isinstance(error, DibitError):
            raise
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
