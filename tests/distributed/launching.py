"""What `accelerate launch` makes of the configurations in `recipes/accelerate`."""

import argparse

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from sparseq.resources import resource_path


def launch_arguments(recipe: str) -> argparse.Namespace:
    """The arguments that the command takes from a configuration."""
    path = resource_path(f"recipes/accelerate/{recipe}.yaml")
    given = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, _ = _validate_launch_command(given)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


def launch_environment(recipe: str) -> dict[str, str]:
    """What the command tells the processes that it starts."""
    arguments = launch_arguments(recipe)
    if arguments.use_deepspeed:
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
