"""`tests.training.tiny` as a configuration file: ``--config=tests/training/tiny_config.py:TEACHER,PROMPTS``."""

from tests.training import tiny


def get_config(argument: str):
    teacher, prompts = argument.split(",")
    return tiny.config(teacher, prompts, steps=6, checkpoint__every=1)
