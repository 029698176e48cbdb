"""The words of the command that is running: its own options, as `click` knows them."""

from typing import Any

import click

from cait_jax.interface import CONFIG, flags, options

# Arguments of the Python API that the commands call otherwise.
_OPTION_OF = {"name_or_path": "model"}


def command_words(name: str, value: Any) -> str | None:
    """The `Interface` of the command that is running; see `cait_jax.interface`."""
    context = click.get_current_context(silent=True)
    if context is None:
        return None
    if context.allow_extra_args and name.startswith(CONFIG):  # `cait plan` takes train.py's flags
        return flags(name, value)
    declared = {
        str(param.name): param
        for param in context.command.params
        if isinstance(param, click.Option)
    }
    of_setting = {param: option.opts[0] for param, option in declared.items()}
    of_setting |= {
        argument: of_setting[param] for argument, param in _OPTION_OF.items() if param in of_setting
    }
    is_flag = frozenset(param for param, option in declared.items() if option.is_flag)
    return options(of_setting, is_flag)(name, value)
