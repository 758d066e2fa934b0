"""What the embedded world ships: teachers and rewards, real folders that need no download."""

from pathlib import Path

from dmdr_jax.errors import UserError

PREFIX = "shapes:"
_HERE = Path(__file__).parent


def resolve(name: str) -> str:
    """``shapes:NAME`` to the shipped folder's path; any other name unchanged.

    Raises:
      UserError: there is no such shipped folder.
    """
    if not name.startswith(PREFIX):
        return name
    folder = _HERE / name.removeprefix(PREFIX)
    if not folder.is_dir():
        known = sorted(p.parent.relative_to(_HERE) for p in _HERE.glob("**/*.json") if p.name in _MARKS)
        raise UserError(f"{name} is not shipped; there are: {', '.join(f'{PREFIX}{k}' for k in known)}.")
    return str(folder)


_MARKS = ("model_index.json", "preprocessor_config.json")
