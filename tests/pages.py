"""Pages of docs/ whose code runs as a test."""

import re
from types import SimpleNamespace


def run_page(text: str) -> SimpleNamespace:
    """What the Python blocks of a page have made when it ends."""
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, scope)
    return SimpleNamespace(**{key: value for key, value in scope.items() if not key.startswith("__")})
